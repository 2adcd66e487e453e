"""Conversion of a network to spiking neurons, and their simulation."""
