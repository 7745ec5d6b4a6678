"""Faults injected for real, and what came of them: `python -m tests.faults` writes the table of
docs/reliability.md.

A fault is a small function that breaks something a number of times, looks at what the project made
of it, and returns the counts (`registry`).  The same functions run with small counts under pytest,
so that the table is not a claim but a test.  A new module of this package that registers a fault is
found by itself.
"""
