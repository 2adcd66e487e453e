"""Training: the built graph, the loop, its schedule, checkpoints, weights, the run directory and its record."""
