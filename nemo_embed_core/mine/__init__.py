"""Hard negatives: encode a corpus once, search it exactly, keep what scores a margin below the positive."""
