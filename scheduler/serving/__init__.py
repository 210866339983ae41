"""Requests for a model: who waits, who goes where, which replicas there are. It sees no prompt and no token."""
