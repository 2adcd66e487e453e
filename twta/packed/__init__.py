"""The integer network: its file, its engines, its costs. Nothing here imports TensorFlow."""
