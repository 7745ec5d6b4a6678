"""How much faster is it?  Step times, layers, GEMMs and full-depth estimates."""
