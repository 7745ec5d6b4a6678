"""Step time from the plan alone: work is counted exactly, priced with few constants, and the constants are held to published steps.

plan → `work` (operations, bytes and messages of a layer, of the vocabulary, of the optimizer) → `price` (seconds a term, by what the
hardware can do and by twelve constants) → `step` (pipeline, bubble, slowest stage).  `gemm` turns measured GEMMs into a smooth
efficiency.  `rows` makes plans of published rows, `fitting` fits the constants, `validation` shows the error on rows not fitted.
"""
