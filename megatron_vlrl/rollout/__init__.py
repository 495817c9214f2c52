"""Prompts -> RolloutGroups, through an engine that holds the policy's weights."""
