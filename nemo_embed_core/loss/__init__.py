"""The contrastive loss and its variants."""
