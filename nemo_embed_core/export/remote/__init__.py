"""Source files that exports get and transformers runs; this package imports none of them."""
