"""The public name: `from nemo_embed_core.embedder import Embedder`."""

from nemo_embed_core.encoders.embedder import Embedder

__all__ = ["Embedder"]
