"""Arithmetic about a plan: sizes, FLOPs, memory, the number of FP8 GEMMs."""
