"""Readers of what other tools wrote: console logs, TensorBoard event files, W&B runs and exports,
as one typed `Log`.
"""
