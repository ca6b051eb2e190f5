"""Peers of the step benchmark that are whole libraries: sentence-transformers 6 with its merged forward,
padded or flattened, either with Liger's kernels, and vLLM for encoding.

Each needs its packages; what is not installed is said and not timed.

Flattened is what sentence-transformers does with flash-attn. Here the flattened tokens go to the attention
backend of ours, so that it takes part without that package and with the same attention.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.step_data import GlobalBatch, Groups, pad
from benchmarks.step_ours import peer_weights
from benchmarks.step_peers import Peer, hf_llama
from nemo_embed_core.config import ModelConfig
from nemo_embed_core.model.attention import Segments, pick_attention

FLATTENED = "benchmark_varlen"  # the name under which transformers finds the attention below


def register_flattened(device: torch.device, dtype: torch.dtype) -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    attention = pick_attention("auto", device, dtype)

    def flattened(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> tuple:
        """q [1, H, T, A], k and v [1, G, T, A] -> [1, T, H, A]"""
        cu, longest = options["cu_seq_lens_q"], options["max_length_q"]
        lengths = cu.diff().tolist() if device.type == "cpu" else ()  # no backend of a GPU reads it
        q_THA, k_TGA, v_TGA = (x[0].transpose(0, 1) for x in (q, k, v))
        return attention(q_THA, k_TGA, v_TGA, Segments(cu, lengths, longest))[None], None

    AttentionInterface.register(FLATTENED, flattened)
    AttentionMaskInterface.register(FLATTENED, lambda *_, **__: None)


def sentence_transformer(llama: nn.Module, hidden_size: int, device: torch.device) -> nn.Module:
    """The library's model around this one; it comes from a small folder, because there is no other way in."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    words = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": 1}, unk_token="[UNK]"))
    with tempfile.TemporaryDirectory() as folder:
        LlamaModel(LlamaConfig(**sizes, num_attention_heads=1, num_key_value_heads=1)).save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")
        tokenizer.save_pretrained(folder)
        transformer = Transformer(folder)
    transformer.model = llama
    return SentenceTransformer(
        modules=[transformer, Pooling(hidden_size, "mean"), Normalize()], device=str(device)
    )


@dataclass(frozen=True)
class Columns:
    """A micro-batch as the library's losses get it: the queries, the positives, each place of a negative."""

    features: list[dict[str, Any]]
    num_rows: int
    num_positions: int


class SentenceTransformers(Peer):
    """embed_columns of sentence-transformers 6 (padded: one forward of the queries, one of all documents;
    flattened: one of each column), and the loss and optimizer of the other peers."""

    def __init__(
        self,
        model: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        train: bool = True,
        *,
        flatten: bool = False,
        liger: bool = False,
    ):
        if flatten:
            register_flattened(device, dtype)
        name = f"sentence-transformers{', Liger' if liger else ''}"
        build = partial(hf_llama, attention=FLATTENED if flatten else "sdpa")
        super().__init__(name, build, model, device, dtype, train)
        self.kind = "flattened" if flatten else "padded"
        if liger:
            # Changes transformers' module too, not only this model: peers with Liger come last.
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama(
                cross_entropy=False, fused_linear_cross_entropy=False, model=self.model
            )
        self.library = sentence_transformer(self.model, model.hidden_size, device)

    def batches(self, groups: Groups, batch: GlobalBatch, batch_size: int) -> list[Columns]:
        out = []
        for i in range(0, len(batch.rows), batch_size):
            rows, documents = batch.rows[i : i + batch_size], batch.documents[i : i + batch_size]
            columns = [[groups.query_tokens(row) for row in rows]]
            columns += [[groups.document_tokens(d) for d in place] for place in documents.T]
            if self.kind == "padded":
                # As embed_columns merges them: the documents of all places as wide as the widest.
                documents_width = pad([text for column in columns[1:] for text in column])[0].shape[1]
                positions = len(rows) * (pad(columns[0])[0].shape[1] + documents.shape[1] * documents_width)
            else:
                positions = sum(len(text) for column in columns for text in column)
            out.append(Columns([self._features(column) for column in columns], len(rows), positions))
        return out

    def _features(self, texts: Sequence[np.ndarray]) -> dict[str, Any]:
        if self.kind == "padded":
            ids, mask = pad(texts)
            return {"input_ids": ids, "attention_mask": mask.long()}
        from transformers import DataCollatorWithFlattening

        flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
        features = flatten([{"input_ids": text} for text in texts])
        return {key: value for key, value in features.items() if key != "labels"}

    def groups(self, batch: Columns) -> tuple[Tensor, Tensor]:
        from sentence_transformers.base.losses.merged_forward import embed_columns

        features = [
            {
                key: x.to(self.device, non_blocking=True) if isinstance(x, Tensor) else x
                for key, x in column.items()
            }
            for column in batch.features
        ]
        q_BD, *documents = embed_columns(self.library, features)
        return q_BD, torch.stack(documents, 1)


def vllm_embedder(encoder: nn.Module, model: ModelConfig, folder: Path) -> Callable[[list], np.ndarray]:
    """ids of texts -> [texts, D] fp32, by vLLM from a folder with these weights and our export's config."""
    import json

    from safetensors.torch import save_file
    from vllm import LLM

    from nemo_embed_core.export.folder import hf_config

    special_ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(hf_config(model, "bfloat16", special_ids)))
    weights = {name: w.contiguous().cpu() for name, w in peer_weights(encoder, model)}
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    server = LLM(
        model=str(folder), runner="pooling", skip_tokenizer_init=True, dtype="bfloat16",
        max_model_len=1024, gpu_memory_utilization=0.5,
    )  # fmt: skip

    def embed(texts: list) -> np.ndarray:
        outputs = server.embed([{"prompt_token_ids": ids.tolist()} for ids in texts], use_tqdm=False)
        return np.array([output.outputs.embedding for output in outputs], np.float32)

    return embed
