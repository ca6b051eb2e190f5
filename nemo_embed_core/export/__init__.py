"""Exports: the Hugging Face folder around the weights, and the proof that it gives our embeddings."""
