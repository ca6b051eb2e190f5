"""The trainer: one global batch per optimizer step, any tp x dp layout, exact resume."""
