"""Retrieval quality through mteb's own evaluator, offline, with BM25 beside it so that a number means
something."""
