"""A folder of documents to a proven model: stages.py plans them, run.py runs them, page.py shows them."""
