"""Data sets as people write them: one module for each format that is read."""
