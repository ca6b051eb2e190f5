"""The distributed part: mesh, collectives, sharded layers, FSDP2 and the gradient norm."""
