"""Quality by mteb's own evaluators, offline, with BM25 beside it as a baseline, and comparisons of it."""
