"""Does the loss hold?  Verdicts, comparisons and their figures."""
