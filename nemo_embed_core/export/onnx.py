"""onnx/model.onnx of a folder: transformers' own model, pooled and normalised inside, in fp32.

    input_ids, attention_mask [N, L] int64  ->  sentence_embedding [N, D], unit rows

Traced by torch.onnx from the folder's weights (pip install 'nemo_embed_core[serve]'); padding may stand on
either side. Prompts are not inside: whoever tokenises puts them before the text.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nemo_embed_core.checkpoint.hf_folder import open_folder
from nemo_embed_core.config import ModelConfig, Pooling
from nemo_embed_core.errors import UserError

FILE = "onnx/model.onnx"  # where sentence-transformers and optimum look for it
SINGLE_BYTES = 1 << 30  # a protobuf ends at 2 GB: larger weights lie beside it, in model.onnx.data


def mean(hidden_NLD: Tensor, mask_NL: Tensor) -> Tensor:
    return (hidden_NLD * mask_NL[..., None]).sum(1) / mask_NL.sum(1, keepdim=True)


def last(hidden_NLD: Tensor, mask_NL: Tensor) -> Tensor:
    return _token(hidden_NLD, mask_NL.cumsum(1).argmax(1))


def cls(hidden_NLD: Tensor, mask_NL: Tensor) -> Tensor:
    return _token(hidden_NLD, mask_NL.argmax(1))


def weightedmean(hidden_NLD: Tensor, mask_NL: Tensor) -> Tensor:
    return mean(hidden_NLD, mask_NL.cumsum(1) * mask_NL)


def _token(hidden_NLD: Tensor, index_N: Tensor) -> Tensor:
    D = hidden_NLD.shape[-1]
    return hidden_NLD.gather(1, index_N[:, None, None].expand(-1, 1, D))[:, 0]


POOL: Mapping[Pooling, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": mean,
    "last": last,
    "cls": cls,
    "weightedmean": weightedmean,
}


class Pooled(nn.Module):
    """normalize(pool(model(input_ids, attention_mask)))"""

    def __init__(self, model: nn.Module, pooling: Pooling):
        super().__init__()
        self.model, self.pool = model, POOL[pooling]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # Of the tokens that are there: transformers counts padding on the left too, which is nothing to
        # rotations, but not to a factor of q by its position (Ministral 3).
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        how = {"attention_mask": attention_mask, "position_ids": positions}
        hidden_NLD = self.model(input_ids=input_ids, **how).last_hidden_state
        return nn.functional.normalize(self.pool(hidden_NLD, attention_mask.to(hidden_NLD.dtype)), dim=-1)


def check_onnx(model: ModelConfig, tokenizer_files: Mapping[str, bytes]) -> None:
    """UserError without the libraries that write it; every model and tokenizer will do."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        install = "pip install 'nemo_embed_core[serve]'"
        raise UserError(f"format=onnx needs {error.name}: {install}") from None


def write_onnx(folder: Path, file: Path | None = None) -> Path:
    """The file, `folder`/onnx/model.onnx unless another is named, of the model in `folder`."""
    from transformers import AutoModel

    file = file or folder / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    pooling = open_folder(folder).model.pooling
    how: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    model = Pooled(AutoModel.from_pretrained(folder, **how), pooling).eval()
    size = sum(p.numel() * p.itemsize for p in model.parameters())
    ids = torch.tensor([[0, 1, 0, 1, 0], [1, 0, 1, 0, 1], [0, 0, 1, 1, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    both = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens")}
    with warnings.catch_warnings():
        # That one axis of both inputs has one name, and what torch asks of its own pytree.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (ids, mask),
            file,
            input_names=["input_ids", "attention_mask"],
            output_names=["sentence_embedding"],
            dynamic_shapes=(both, both),
            external_data=size > SINGLE_BYTES,
            dynamo=True,
            verbose=False,
        )
    return file
