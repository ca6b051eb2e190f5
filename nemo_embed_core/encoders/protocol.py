"""What mining, evaluation and proofs need of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class TextEncoder(Protocol):
    """Texts to vectors. Some have more, which is asked for with hasattr:

    tokenize(texts, prompt, max_length) -> (ids of each text, how many lost tokens)   truncation is counted
    encode_tokens(ids)                                                                a text is tokenised once
    """

    @property
    def digest(self) -> str: ...  # of the weights: two models with other weights never have the same

    @property
    def hidden_size(self) -> int: ...

    def encode(
        self, texts: Sequence[str], prompt: str = "", max_length: int = 512, side: str | None = None
    ) -> np.ndarray:
        """[len(texts), hidden_size] fp32 rows of prompt + text, cut at max_length tokens, in the given order.

        side: "query" or "document", for models that have other modules for each; the rest give the same for
        both.
        """
        ...
