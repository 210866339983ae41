"""Which request is let in, and when: the queue, its bounds, and the watermarks of the replicas."""
