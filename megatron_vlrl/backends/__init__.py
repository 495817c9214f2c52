"""What a kind of hardware provides to the trainer."""
