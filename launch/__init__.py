"""Where a plan runs: on this machine today."""
