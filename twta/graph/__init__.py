"""The TensorFlow side: the switch to its version 1, sessions, preprocessing and fast convolutions."""
