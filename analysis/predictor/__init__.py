"""Step time from the plan alone: work is counted exactly, priced with few constants, and the
constants are held to published steps.

plan → `work` (operations, bytes and messages of a layer, of the vocabulary, of the optimizer) →
`price` (seconds a term, by what the hardware can do, by twelve fitted constants and by numbers set
by hand) → `step` (pipeline, bubble, slowest stage).  `gemm` turns measured GEMMs into a smooth
efficiency.  `rows` makes plans of published rows, `fitting` fits the constants, `validation` finds
the error on rows not fitted; `validation_tables` and `documents` show it, with every constant and
what the intervals hold.
"""
