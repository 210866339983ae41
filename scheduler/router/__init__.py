"""Which replica a request goes to: policies, the loads and the prefix index that they look at."""
