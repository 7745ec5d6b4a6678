"""The heavy half: how NeMo trains a plan.

Nothing outside this package imports torch, Megatron-Core or NeMo.
"""
