"""FP8 numerics: formats, scales and the three GEMMs of a linear layer, bit for bit, in plain torch
on any device.
"""
