"""The engine: continuous batching of many requests over one replica's cache and model. No Ray, no threads."""
