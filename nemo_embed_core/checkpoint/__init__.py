"""Sharded checkpoints, published whole or not at all, and what reads them and other model folders."""
