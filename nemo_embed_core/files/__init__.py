"""Durable publishing, the lock of a folder, safetensors, JSON. Nobody else fsyncs, locks or hashes a file."""
