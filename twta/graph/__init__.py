"""What TensorFlow computes: the switch to its version 1, sessions, images, fast convolutions, the built graph."""
