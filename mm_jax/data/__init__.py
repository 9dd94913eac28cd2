"""From chat messages to packed batches, all in numpy on the host."""
