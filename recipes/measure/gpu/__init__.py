"""What the measuring commands run, with torch and Transformer Engine."""
