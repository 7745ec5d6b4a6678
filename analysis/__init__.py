"""What came out: run folders read and judged.  Nothing here imports torch, NeMo or launch/."""
