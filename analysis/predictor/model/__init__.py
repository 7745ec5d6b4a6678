"""The cost of a training step, term by term."""
