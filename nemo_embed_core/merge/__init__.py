"""Checkpoints and folders to one Hugging Face folder: converted, or averaged in blocks, without a GPU."""
