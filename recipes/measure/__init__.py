"""Measurements of one machine or GPU, a command each; the work is in `gpu`."""
