"""Qwen3-VL: geometry, names and prompts, independent of the backend."""
