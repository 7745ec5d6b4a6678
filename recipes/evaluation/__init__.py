"""What a checkpoint is worth: held-out loss, tasks, export."""
