"""Names and signatures of upstream packages that the heavy half uses, checked against each stack's own sources."""
