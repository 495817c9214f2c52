"""Degrees, process groups, collectives, and the vocabulary-parallel log-prob."""
