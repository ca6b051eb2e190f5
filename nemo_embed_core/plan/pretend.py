"""The engine itself, as the first rank of a cluster that is not there: fake process groups carry nothing,
fake tensors hold nothing, and the kernels' fake functions stand for the kernels. A step of the whole 8B takes
seconds on a laptop.

    seen = pretend(config, model, world_size, batches)      seen.traffic, seen.peak, seen.components

What is seen is what the code does: every collective with its bytes (parallel/wire.py: Counted) and every
allocation. Not seen is what happens inside a kernel or a library: workspaces of cuBLAS and NCCL,
FlashAttention's fp32 accumulator of dQ, what the allocator loses to fragments, the CUDA context (SLACK of
report.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_embed_core.config.model import ModelConfig
from nemo_embed_core.config.train import TrainConfig
from nemo_embed_core.data.shapes import Shape
from nemo_embed_core.data.teacher_vectors import teacher_width
from nemo_embed_core.model.attention import varlen_attention
from nemo_embed_core.parallel.grad_norm import local_tensor
from nemo_embed_core.parallel.layout import check_layout
from nemo_embed_core.parallel.mesh import build_mesh
from nemo_embed_core.parallel.wire import Counted, Key, Traffic
from nemo_embed_core.train.engine import Engine

PARTS = ("weights", "optimizer states", "weights gathered", "gradients", "activations and buffers")


@dataclass(frozen=True)
class Seen:
    """Bytes on the rank; `components` by PARTS at the moment of the peak, whose sum it is."""

    peak: int
    components: dict[str, int]
    at: str  # when the peak is
    traffic: dict[Key, Traffic]


class Allocations(TorchDispatchMode):
    """Bytes of all fake storages that live, and the most of them at once. `watch(count)` is called at
    allocation number `stop`, if any."""

    def __init__(self, stop: int | None = None, watch: Any = None):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.total = self.peak = self.count = self.peak_at = 0
        self._stop, self._watch = stop, watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # What a DTensor allocates is seen as its result alone.
        for x in map(local_tensor, tree_leaves(out)):
            if isinstance(x, FakeTensor):
                storage = x.untyped_storage()
                if storage._cdata not in self.sizes:
                    self._set(storage._cdata, storage.nbytes())
                    weakref.finalize(storage, self._free, storage._cdata)
        return out

    def _free(self, key: int) -> None:
        self.total -= self.sizes.pop(key, 0)

    def _set(self, key: int, size: int) -> None:
        self.total += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        self.count += 1
        if self.total > self.peak:
            self.peak, self.peak_at = self.total, self.count
        if self.count == self._stop:
            self._watch()

    @contextmanager
    def resizes(self) -> Iterator[None]:
        """FSDP2 frees gathered weights by resizing their storage, which is no operation."""
        resize, allocations = torch.UntypedStorage.resize_, self

        def tracked(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result = resize(storage, size)
            if storage._cdata in allocations.sizes:
                allocations._set(storage._cdata, size)
            return result

        with mock.patch.object(torch.UntypedStorage, "resize_", tracked):
            yield


def pretend(
    config: TrainConfig, model: ModelConfig, world_size: int, shapes: Sequence[Shape], parts: bool = True
) -> Seen:
    """One step of these micro-batches on rank 0 of world_size; no process group may exist. parts: what the
    peak is made of is seen in a second run, which stops there to look."""
    seen, allocations = _step(config, model, world_size, shapes, None)
    return _step(config, model, world_size, shapes, allocations.peak_at)[0] if parts else seen


def _step(
    config: TrainConfig, model: ModelConfig, world_size: int, shapes: Sequence[Shape], look_at: int | None
) -> tuple[Seen, Allocations]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    parallel = config.parallel
    dp_size = check_layout(parallel, world_size, model)
    phase, components, at = "building", {}, ""

    def begin(name: str, i: int) -> None:
        nonlocal phase
        phase = f"{name} of micro-batch {i + 1}"

    def look() -> None:
        nonlocal components, at
        components, at = _components(engine, allocations), phase

    allocations = Allocations(look_at, look)
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    @contextmanager
    def memory() -> Iterator[None]:
        with mode, allocations, allocations.resizes():
            yield

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        device = torch.device("cpu")  # whose fake tensors need no CUDA build of torch
        mesh = build_mesh(
            device, dp_size, parallel.tp_size, parallel.sequence_parallel, parallel.dp_replicate
        )
        width = teacher_width(config)
        engine = Engine(
            config, model, mesh, torch.bfloat16, attention=varlen_attention, memory=memory(),
            teacher_width=width,
        )  # fmt: skip
        # Every tensor says that it is on a GPU, so that the kernels' wrappers take the kernels.
        on_gpu = mock.patch.object(torch.Tensor, "is_cuda", True)
        with memory(), on_gpu, Counted(mesh) as counted:
            engine.forward_backward([shape.tensors(config.loss, width) for shape in shapes], begin)
            phase = "the gradient norm"
            engine.clip()
            phase = "the optimizer"
            engine.update(config.optim.lr)
    finally:
        dist.destroy_process_group()
    return Seen(allocations.peak, components, at, dict(counted.traffic)), allocations


def _components(engine: Engine, allocations: Allocations) -> dict[str, int]:
    """Live bytes by PARTS."""
    parts: dict[str, list[Any]] = {part: [] for part in PARTS}
    if not isinstance(engine.model, FSDPModule):
        parts["weights"] = list(engine.model.parameters())
        parts["gradients"] = [p.grad for p in parts["weights"]]
    for module in engine.model.modules():
        group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
        for parameter in group.fsdp_params if group is not None else ():
            parts["weights"].append(parameter.sharded_param)
            parts["weights gathered"] += parameter.all_gather_outputs
            parts["gradients"] += [parameter.sharded_param.grad, parameter.unsharded_accumulated_grad]
            if hasattr(parameter, "_unsharded_param"):  # not before the first gather
                parts["weights gathered"].append(parameter._unsharded_param)
                parts["gradients"].append(parameter._unsharded_param.grad)
    parts["optimizer states"] = [x for state in engine.optimizer.state.values() for x in state.values()]
    left, found = dict(allocations.sizes), {}
    for part, tensors in parts.items():
        storages = {local_tensor(x).untyped_storage()._cdata for x in tensors if isinstance(x, torch.Tensor)}
        found[part] = sum(left.pop(storage, 0) for storage in storages)
    return {**found, PARTS[-1]: sum(left.values())}
