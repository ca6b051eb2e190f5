"""Checkpoints and folders to one Hugging Face folder: converted, or averaged in blocks of rows. No GPU, no process group."""
