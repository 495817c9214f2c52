"""Reinforcement learning with verifiable rewards for Qwen3-VL, on the engines of large-scale training."""

__version__ = "0.1.0"
