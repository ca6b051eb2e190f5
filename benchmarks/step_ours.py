"""The step benchmark's own side: train/engine.py with random weights, and its weights under the names of
Hugging Face's LlamaModel.

D hidden_size · H query heads · G KV heads · A head_dim
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.step_data import TEMPERATURE, GlobalBatch
from nemo_embed_core.config import ModelConfig, TrainConfig
from nemo_embed_core.parallel import fsdp
from nemo_embed_core.parallel.grad_norm import local_tensor
from nemo_embed_core.parallel.mesh import Mesh
from nemo_embed_core.train.engine import Engine
from nemo_embed_core.train.metrics import ToHost
from nemo_embed_core.train.step import embed


@torch.no_grad()
def fill_random(encoder: nn.Module, seed: int, std: float) -> None:
    """On the device, in place: matrices normal(0, std), norms uniform in [0.5, 1.5] so that an ignored one
    shows."""
    weights = [local_tensor(p.detach()) for p in encoder.parameters()]
    generator = torch.Generator(weights[0].device).manual_seed(seed)
    for w in weights:
        if w.ndim == 1:
            w.uniform_(0.5, 1.5, generator=generator)
        else:
            w.normal_(0, std, generator=generator)


class Ours:
    """train/engine.py with random weights, and the finite check of the trainer."""

    def __init__(
        self,
        model: ModelConfig,
        mesh: Mesh,
        dtype: torch.dtype,
        std: float = 0.02,
        checkpointing: str = "none",
        optim: dict[str, str] | None = None,
        fp8: bool = False,
    ):
        options = {"activation_checkpointing": checkpointing, "loss": {"temperature": TEMPERATURE}}
        options |= {"optim": optim or {}, "precision": "fp8" if fp8 else "auto"}
        config = TrainConfig.from_dict({"output_dir": "", "steps": 1, **options})
        self.mesh, self.engine, self.lr = mesh, Engine(config, model, mesh, dtype), config.optim.lr
        self.encoder = self.engine.model
        fill_random(self.encoder, 0, std)

    def backward(self, batch: GlobalBatch) -> Tensor:
        """loss [B] in the order of the micro-batches; gradients are left on the parameters."""
        return self.engine.forward_backward(batch.micro_batches)[0]

    def step(self, batch: GlobalBatch) -> float:
        losses_B = self.backward(batch)
        norm = self.engine.clip()
        # As the trainer: the device refuses a step that is not finite, and the host asks after the launch.
        loss = losses_B.mean()
        read = ToHost(torch.stack([loss, norm]))
        self.engine.update(self.lr, loss.isfinite())
        return read.tolist()[0]

    @torch.no_grad()
    def groups(self, batch: GlobalBatch) -> tuple[Tensor, np.ndarray]:
        """Embeddings [B, 1 + M, D] of query and passages, and the row of each."""
        out = []
        for micro_batch in batch.micro_batches:
            micro_batch = micro_batch.to(self.mesh.device)
            rows = embed(self.encoder, micro_batch)
            index = torch.cat([micro_batch.query_index[:, None], micro_batch.document_index], 1)
            out.append(rows[index])
        return torch.cat(out), np.concatenate([b.rows for b in batch.micro_batches])


@torch.no_grad()
def peer_weights(
    encoder: nn.Module, model: ModelConfig, value: Callable[[Tensor], Tensor] = torch.detach
) -> Iterator[tuple[str, Tensor]]:
    """(name in Hugging Face's LlamaModel, value(our parameter) cut out of the fused matrices)."""
    G, A, D = model.num_key_value_heads, model.head_dim, model.hidden_size
    R = model.num_attention_heads // G
    for full_name, p in encoder.named_parameters():
        name, w = fsdp.plain_name(full_name).removeprefix("model."), local_tensor(value(p))
        if name.endswith("qkv_proj.weight"):
            blocks = w.view(G, R + 2, A, D)
            for part, rows in (
                ("q_proj", blocks[:, :R]),
                ("k_proj", blocks[:, R]),
                ("v_proj", blocks[:, R + 1]),
            ):
                yield name.replace("qkv_proj", part), rows.reshape(-1, D)
        elif name.endswith("gate_up_proj.weight"):
            blocks = w.view(model.mlp_blocks, 2, -1, D)
            for i, part in enumerate(("gate_proj", "up_proj")):
                yield name.replace("gate_up_proj", part), blocks[:, i].reshape(-1, D)
        else:
            yield name, w
