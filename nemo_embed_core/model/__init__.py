"""The bidirectional Llama on flat packed tokens and its Hugging Face names."""
