"""The TensorFlow side: the switch to its version 1, sessions, preprocessing, fast convolutions, the built graph."""
