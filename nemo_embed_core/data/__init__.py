"""Text in, packed token batches out: readers -> store -> sampler -> packing."""
