"""Training that dies, hangs, or has numbers that are none; what counts is the end.

A run that was broken and continued must have the numbers of one that nothing touched
(`runs.unbroken`), in every step and to the bit, and the bits of its last checkpoint, which hold
weights, optimizer and FP8 state (scales and amax histories).  The processes are the real ones
(`process`); most are forked from a server that has imported NeMo, so that a fault costs seconds.
"""
