"""A packed network for other programs."""
VECTORS = 4
WRITERS = {}
