"""From overrides to a checked plan: composition, defaults, rules, layouts that fit, remedies."""
