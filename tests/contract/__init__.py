"""Names and signatures of upstream packages, checked against each stack's own sources."""
