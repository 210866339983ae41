"""Which pages move from one replica to another, over which link, and whether that pays."""
