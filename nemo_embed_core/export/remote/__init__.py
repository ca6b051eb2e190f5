"""Source files that are copied into exports and run there by transformers; this package imports none of them."""
