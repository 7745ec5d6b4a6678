"""What can be known of training data without torch: files, indexed sets, tokenizers."""
