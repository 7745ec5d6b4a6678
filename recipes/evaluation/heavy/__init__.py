"""The part of evaluation that imports torch and NeMo."""
