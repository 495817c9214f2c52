"""Errors that a user can act on: each says what is wrong, which value, and the fix."""

from __future__ import annotations


class VLRLError(Exception):
    """Base of every error this package raises on purpose; the CLI prints it without a traceback."""


class ConfigError(VLRLError):
    """A configuration that cannot run, found before anything is built."""


class DataError(VLRLError):
    """Shards, samples or folders that cannot be read as what they claim to be."""


class CheckpointError(VLRLError):
    """A checkpoint that is damaged, of another model, or could not be written."""


class ModelError(VLRLError):
    """A Hugging Face folder or a weight set that does not fit the model."""


class RolloutError(VLRLError):
    """An engine that could not answer, or whose weights are not the trainer's."""


class TrainingError(VLRLError):
    """A step that cannot be taken, on every rank alike (non-finite values, no usable group)."""


class SampleError(DataError):
    """One sample that cannot be used: skipped, counted and named, until the budget of the run is spent."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"sample {key!r}: {reason}")
        self.key = key
        self.reason = reason
