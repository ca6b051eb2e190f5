"""Sharded checkpoints that are published whole or not at all, and the merger that turns them into Hugging
Face weights."""
