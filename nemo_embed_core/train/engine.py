"""The model on its mesh, its optimizer and a step of them, without files: what trains, what benchmarks time
and tests ask.

engine = Engine(config, model, mesh)
    ...                    # values into the parameters of engine.model, which hold none yet
losses_B, stats = engine.forward_backward(batches)
norm = engine.clip()
engine.update(lr)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from nemo_embed_core.config import ModelConfig, TrainConfig
from nemo_embed_core.data.packing import MicroBatch
from nemo_embed_core.kernels.dropout_linear import run_key
from nemo_embed_core.model.attention import Attention, pick_attention
from nemo_embed_core.model.encoder import Encoder
from nemo_embed_core.model.lora import add_lora
from nemo_embed_core.model.spec import adapter_shapes, parameter_shapes, tp_dim, tp_unit
from nemo_embed_core.parallel import fsdp
from nemo_embed_core.parallel.boxes import Box, local_box
from nemo_embed_core.parallel.fp8 import gather_in_fp8, weights_kept
from nemo_embed_core.parallel.grad_norm import clip_factor, grad_norm, sync_replicated_grads
from nemo_embed_core.parallel.layers import run_in_fp8
from nemo_embed_core.parallel.mesh import DTYPES, Mesh, pick_precision
from nemo_embed_core.train.learned import Projection, Temperature
from nemo_embed_core.train.metrics import peak_memory
from nemo_embed_core.train.optim import build_optimizer, check_master_weights, ensure_state, place_of, update
from nemo_embed_core.train.step import forward_backward


def run_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    return DTYPES[pick_precision(config.precision, device)]


class Engine:
    """Every rank makes one. dtype: of the forward and backward, where it is not that of config.precision.

    attention, memory: for a plan, the one of another device and a mode in which nothing is really allocated.
    teacher_width: columns of the vectors that the loss asks for.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: ModelConfig,
        mesh: Mesh,
        dtype: torch.dtype | None = None,
        *,
        attention: Attention | None = None,
        memory: AbstractContextManager[object] | None = None,
        teacher_width: int = 0,
    ):
        self.config, self.model_config, self.mesh = config, model, mesh
        self.teacher_width = teacher_width
        self.shapes = parameter_shapes(model) | adapter_shapes(model, config.lora)
        # Gets the rows [N, D] of every forward of a step, without their graph, and its micro-batch.
        self.seen: Callable[[Tensor, MicroBatch], None] | None = None
        self.step = 0  # of the run; masks of LoRA's dropout are others in each
        self.dtype = dtype or run_dtype(config, mesh.device)
        check_master_weights(config.optim, self.dtype)
        attention = attention or pick_attention(config.attention, mesh.device, self.dtype)
        with torch.device("meta"):  # no memory before it is sharded
            selective = config.activation_checkpointing == "selective"
            self.model = Encoder(model, mesh.tp, attention, selective)
            if config.lora.rank:
                add_lora(self.model, config.lora)
        if config.precision == "fp8":
            run_in_fp8(self.model)
        split = config.optim.master_weights == "split"
        fsdp.shard(
            self.model,
            self.model.model.layers,
            mesh,
            dtype=self.dtype,
            runs_as_stored=split,
            reshard_after_forward=config.parallel.reshard_after_forward,
            reduce_dtype=DTYPES[config.parallel.reduce_dtype],
            activation_checkpointing=config.activation_checkpointing == "full",
        )
        with memory or nullcontext():
            self.model.to_empty(device=mesh.device)
            if split:
                fsdp.keep_gradients_in_fp32(self.model)
            if config.precision == "fp8" and mesh.shard_size > 1:
                gather_in_fp8(self.model, mesh.shard_group)
            found = {p: name for name, p in self.trained()}
            places = {
                p: place_of(name, self.shapes[name], self.box(name), model) for p, name in found.items()
            }
            matrices = {p: place for p, place in places.items() if place is not None}
            self.optimizer = build_optimizer(self.model, config.optim, config.seed, matrices)
            ensure_state(self.optimizer)
            loss, wide = config.loss, torch.promote_types(self.dtype, torch.float32)
            self.temperature: Temperature | None = None
            if loss.temperature_lr:
                self.temperature = Temperature(loss, config.optim, wide, mesh.device)
            self.projection: Projection | None = None
            if loss.needs_vectors:
                columns = teacher_width, model.hidden_size
                self.projection = Projection(columns, loss, config.optim, wide, mesh.device)
            self._learned = [x for x in (self.temperature, self.projection) if x is not None]

    def trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        """(our name, parameter) of those that have gradients and optimizer state."""
        named = self.model.named_parameters()
        return [(fsdp.plain_name(name), p) for name, p in named if p.requires_grad]

    def box(self, name: str) -> Box:
        """What this rank holds of our parameter."""
        mesh, unit = self.mesh, tp_unit(name, self.model_config)
        return local_box(
            self.shapes[name],
            tp_dim(name),
            mesh.tp.rank,
            mesh.tp.size,
            mesh.shard_rank,
            mesh.shard_size,
            unit,
        )

    def forward_backward(
        self, batches: Sequence[MicroBatch], before: Callable[[str, int], None] = lambda phase, i: None
    ) -> tuple[Tensor, Tensor]:
        """step.forward_backward, with gradients of these micro-batches alone."""
        at = 0

        def begin(phase: str, i: int) -> None:
            nonlocal at
            at = i
            before(phase, i)

        self.optimizer.zero_grad(set_to_none=True)
        if self.config.lora.dropout:
            self.model.model.dropout_key = run_key(self.config.seed, self.step)
        for learned in self._learned:
            learned.drop_gradient()
        beside = [
            None if learned is None else learned.value for learned in (self.temperature, self.projection)
        ]
        seen, hook = self.seen, None
        if seen is not None:
            hook = self.model.register_forward_hook(lambda m, given, rows: seen(rows.detach(), batches[at]))
        try:
            with weights_kept(self.model):
                return forward_backward(
                    self.model, batches, self.mesh, self.config.loss, self.dtype, begin, *beside
                )
        except (MemoryError, RuntimeError) as error:
            if _is_out_of_memory(error):
                error.add_note(self._memory_note(batches, at))
            raise
        finally:
            if hook is not None:
                hook.remove()

    def rehearse(self, batches: Sequence[MicroBatch], before: Callable[[str, int], None]) -> None:
        """A forward_backward that is forgotten: what is left of it is what the allocator has seen."""
        self.forward_backward(batches, before)
        self.drop_step()

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Within, `step.embed` under no_grad; gradients of the step before are forgotten, and nothing of what
        it does is left."""
        self.drop_step()
        self.model.eval()
        try:
            with weights_kept(self.model):
                yield
        finally:
            self.model.train()
            self.drop_step()  # weights that were gathered are those of this step

    def _memory_note(self, batches: Sequence[MicroBatch], at: int) -> str:
        batch, peak = batches[at], peak_memory(self.mesh.device)
        return (
            f"rank {self.mesh.rank} was in micro-batch {at + 1} of {len(batches)}: {batch.num_tokens} "
            f"tokens in {batch.num_sequences} sequences, the longest of {batch.max_seqlen}; peak memory "
            f"{peak / 1e9:.2f} GB. Lower data.max_tokens={self.config.data.max_tokens}, recompute "
            f"more (activation_checkpointing={self.config.activation_checkpointing}: next is selective, then "
            "full) or use more ranks"
        )

    def clip(self) -> Tensor:
        """The global gradient norm before clipping, which update() does; once after each forward_backward."""
        sync_replicated_grads(self.model, self.mesh)
        norm = grad_norm(self.model.parameters(), self.mesh)
        self.factor = clip_factor(norm, self.config.optim.clip_norm)
        for learned in self._learned:
            learned.reduce(self.mesh.dp_group)
        return norm

    def update(self, lr: float, finite: Tensor | None = None) -> None:
        """AdamW with the clipped gradients. No weight and no moment changes where the norm is not finite, or
        `finite`, a bool on the device, is false."""
        factor = self.factor if finite is None else torch.where(finite, self.factor, 0.0)
        update(self.optimizer, lr, factor)
        for learned in self._learned:
            learned.update(lr, factor != 0)

    def drop_step(self) -> None:
        """Forget a forward_backward that was left half-done; weights and moments were not touched by it."""
        fsdp.drop_step(self.model)
        for learned in self._learned:
            learned.drop_gradient()


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
