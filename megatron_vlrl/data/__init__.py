"""Shards on disk -> Samples, in a resumable global order."""
