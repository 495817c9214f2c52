"""Microbatches -> updated weights."""
