"""Run state to and from disk: atomic, verified; weights to Hugging Face."""
