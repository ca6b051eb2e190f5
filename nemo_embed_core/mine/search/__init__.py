"""Exact top-k of documents below each query's own ceiling: topk.py has what is called from outside."""
