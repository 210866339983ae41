"""What rayk says of itself to Prometheus: one table of metrics, readings of them, and what carries these away."""
