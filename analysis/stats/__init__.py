"""Series and intervals."""
