"""One file per question; each runs as `python -m benchmarks.<name>` from the repository's root."""
