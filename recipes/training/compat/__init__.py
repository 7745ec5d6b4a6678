"""Replacements in other people's code: what they replace, and why."""
