"""Rewards -> advantages, shaping and schedules: pure functions, torch-free but for `losses`."""
