"""What a model is, apart from any backend."""
