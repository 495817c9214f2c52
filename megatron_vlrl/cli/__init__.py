"""argv -> Config -> one command."""
