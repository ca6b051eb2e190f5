"""Retrieval quality by mteb's own evaluator, offline, with BM25 beside it as a baseline."""
