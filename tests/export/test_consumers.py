"""What is made of the answers of transformers about a folder's mask."""

from pathlib import Path

import numpy as np
import pytest

from nemo_embed_core.errors import UserError
from nemo_embed_core.export.consumers import check_attention, reload_request


@pytest.mark.parametrize(
    ("is_causal", "changes", "message"),
    [
        (False, (0.5, 0.25), ""),
        (False, (0.5, 0.0), r"with a causal mask in 1 of 2 cases \(b\): .*must have is_causal: false"),
        (None, (0.0, 0.0), r"with a causal mask in 2 of 2 cases .* \(found: null\)"),
        (True, (0.0, 0.0), ""),
        (True, (0.0, 1e-9), r"without a causal mask in 1 of 2 cases \(b\): .* says is_causal: true"),
        (True, (float("nan"), 0.0), "hidden states are NaN"),
    ],
)
def test_the_mask_is_as_config_json_says(is_causal: bool | None, changes: tuple, message: str) -> None:
    vectors = {
        "case_names": np.array(["a", "b"]),
        "first_state_changes": np.array(changes),
        "transformers_version": np.array("5.24"),
    }
    config = {"is_causal": is_causal}
    if not message:
        return check_attention(Path("folder"), config, vectors, False)
    with pytest.raises(UserError, match=message):
        check_attention(Path("folder"), config, vectors, False)


def test_the_process_that_asks_is_told_which_answer_goes_on() -> None:
    for causal in (False, True):
        assert reload_request([], 8, False, causal=causal)["causal"] is causal
