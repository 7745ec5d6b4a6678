"""Facts read from NVIDIA's sources: NeMo's recipes and NVIDIA's performance scripts."""
