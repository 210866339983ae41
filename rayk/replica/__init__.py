"""A replica behind messages: a cache, its page exchange with peers, and the log of what its cache changes."""
