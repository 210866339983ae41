"""A Cluster's requests in the driver: made of prompts, dispatched to engines, followed until their end."""
