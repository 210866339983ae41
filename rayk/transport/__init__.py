"""How pages travel between replicas: lines of several kinds behind one protocol, and which one a pair uses."""
