"""How the predictor's constants are fitted, validated and stored."""
