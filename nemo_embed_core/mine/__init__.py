"""Hard negatives: encode a corpus once, search it exactly, keep what scores below the positive by a margin."""
