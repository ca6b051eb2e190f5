"""An embedder that has to find each row's document: ranks by hand, vectors that are none."""

from collections.abc import Sequence

import numpy as np
import pytest

from nemo_embed_core.data.formats.row import Row
from nemo_embed_core.errors import UserError
from nemo_embed_core.synthesize.assemble import Made, not_found
from nemo_embed_core.synthesize.tasks import TASKS, Item

VECTORS = {
    "query 0": (1, 0),
    "query 1": (0, 1),
    "first": (3, 1),
    "second": (2, 2),
    "third": (4, 0),
    "none": (np.nan, 0),
}


class Embedder:
    digest, hidden_size = "toy", 2

    def encode(
        self, texts: Sequence[str], prompt: str = "", max_length: int = 512, side: str | None = None
    ) -> np.ndarray:
        assert ("answer it" in prompt) == (side == "query")
        return np.array([VECTORS[text] for text in texts], np.float32)


def rows(*positives: str) -> list[Made]:
    item = Item(0, TASKS["question"], 0, "English")
    return [Made(item, "", Row(f"query {i}", [text], [], "", 1)) for i, text in enumerate(positives)]


@pytest.mark.parametrize("top_k, missed", [(1, {0, 1}), (2, {1}), (3, set())])
def test_a_row_has_its_document_among_the_top_k_of_all(top_k: int, missed: set[int]) -> None:
    """Query 0 has third, first, second; query 1 second, first, third."""
    assert not_found(rows("first", "third"), ["second"], Embedder(), top_k) == missed


def test_a_vector_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(UserError, match=r"1 of 3 document embeddings have NaN .* 'none'"):
        not_found(rows("first", "none"), ["second"], Embedder(), 3)
