"""Conversion to spiking neurons, and their simulation."""
