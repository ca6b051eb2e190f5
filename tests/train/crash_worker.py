"""Trains in forked processes on request, so that a crash test pays for `import torch` once. Linux.

Reads one JSON object per line (see `run`) and answers {"codes": [...], "stderr": [...], "seconds": [...],
"phases": [...]}, one entry per rank: its exit status (-9: SIGKILL), what it printed, when it ended, and where
it was when a signal was sent. The ranks run launch/train.py's own `train`, ended as run_rank ends it.
"""

import ctypes
import hashlib
import importlib.util
import json
import os
import socket
import sys
import tempfile
import time
from pathlib import Path

LAUNCHER = Path(__file__).parents[2] / "launch/train.py"


def build_config(values: dict):
    from nemo_embed_core import config as c

    model = {**values["model"], "rope_scaling": c.RopeScaling(**values["model"]["rope_scaling"])}
    data = {**values["data"], "datasets": [c.DatasetConfig(**d) for d in values["data"]["datasets"]]}
    return c.TrainConfig(
        **{
            **values,
            "model": c.ModelConfig(**model),
            "data": c.DataConfig(**data),
            "loss": c.LossConfig(**values["loss"]),
            "optim": c.OptimConfig(**values["optim"]),
            "parallel": c.ParallelConfig(**values["parallel"]),
            "checkpoint": c.CheckpointConfig(**values["checkpoint"]),
        }
    )


def plant(request: dict, rank: int) -> None:
    """Faults that no environment variable makes: NaN, spikes. And a record of the rows that were really
    trained on."""
    from torch import nan, ones_like

    from nemo_embed_core.parallel.grad_norm import local_tensor
    from nemo_embed_core.train.engine import Engine
    from nemo_embed_core.train.spikes import NonFiniteError
    from nemo_embed_core.train.trainer import Trainer

    kind, at = request.get("plant", ""), request.get("plant_step")
    mine = rank in request.get("plant_ranks", [0])
    real_step, real_forward_backward = Trainer.train_step, Engine.forward_backward
    current = [0]

    def digest(self) -> str:
        return hashlib.sha256(
            b"".join(t.numpy().tobytes() for t in self.state.tensors().values())
        ).hexdigest()

    def train_step(self):
        current[0] = self.step
        before = digest(self) if kind.startswith("nan") else ""
        try:
            return real_step(self)
        except NonFiniteError:
            print("weights and moments as before:", before == digest(self), file=sys.stderr)
            raise

    def poison(module, args, embeddings_ND):
        factor = ones_like(embeddings_ND)
        factor[0] = nan
        return embeddings_ND * factor

    def forward_backward(engine, batches, before):
        model, mesh = engine.model, engine.mesh
        hit = mine and current[0] == at
        hook = model.register_forward_hook(poison) if hit and kind == "nan embedding" else None
        losses_B, stats = real_forward_backward(engine, batches, before)
        if hook is not None:
            hook.remove()
        if hit and kind == "nan loss":
            losses_B[0] = nan
        if hit and kind == "nan gradient":
            grads = (local_tensor(p.grad) for p in model.parameters() if p.grad is not None)
            next(g for g in grads if g.numel()).view(-1)[0] = nan
        if hit and kind == "spike":
            losses_B *= 100
        if request.get("rows"):
            rows = [int(row) for batch in batches for row in batch.rows]
            with open(f"{request['rows']}-{mesh.dp_rank}-{mesh.tp.rank}.jsonl", "a") as file:
                file.write(json.dumps([current[0], rows]) + "\n")
        return losses_B, stats

    Trainer.train_step, Engine.forward_backward = train_step, forward_backward


def main_of_rank(request: dict, rank: int, port: int, stderr: int) -> None:
    """Never returns."""
    from nemo_embed_core.errors import run_rank, user_errors

    os.dup2(stderr, 2)
    os.dup2(stderr, 1)  # stdout is the answer channel
    ctypes.CDLL(None).prctl(1, 9)  # no rank outlives a test that was ended
    world_size = request["world_size"]
    env = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({k: str(v) for k, v in env.items()})
    fail = request.get("fail", "")
    os.environ["NEMO_EMBED_FAIL"] = fail if rank in request.get("fail_ranks", [0]) else ""
    spec = importlib.util.spec_from_file_location("train_launcher", LAUNCHER)
    launcher = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launcher)

    def main() -> None:
        import torch

        torch.set_num_threads(1)
        plant(request, rank)
        with user_errors():
            launcher.train(build_config(request["config"]))

    run_rank(main)


def phase(output: Path, started: float) -> str:
    if any(output.glob(".tmp-step-*")):
        return "save"
    metrics = output / "metrics.jsonl"
    return "step" if metrics.exists() and metrics.stat().st_mtime > started else "start"


def run(request: dict) -> dict:
    """{"config": {TrainConfig}, "world_size": n} and, all optional:

    "fail", "fail_ranks": NEMO_EMBED_FAIL on these ranks; "ranks": only these are started; "plant", "rows":
    see `plant` "signals": [{"signal": 15, "ranks": [0], "at_step": 3 (lines in metrics.jsonl, written by this
    run)
                 or "when_saving": n (a .tmp-step folder is there for the n-th time) or "when_ended": rank,
                 "delay_s": 0.5 (since then, or since the signal before)}], sent in this order
    "end_others": true: as torchrun does, a rank that fails ends the others; false: they must end by
    themselves "limit_s": then every rank left is killed
    """
    world_size, output = request["world_size"], Path(request["config"]["output_dir"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started, clock = time.time(), time.monotonic()
    pids, logs = {}, {}
    for rank in request.get("ranks", range(world_size)):
        logs[rank] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        pid = os.fork()
        if pid == 0:
            main_of_rank(request, rank, port, logs[rank].fileno())
        pids[rank] = pid
    codes, seconds, phases = {}, {}, []
    signals, saves, was_saving = list(request.get("signals", [])), 0, False
    due_since = clock if signals and not {"at_step", "when_saving", "when_ended"} & signals[0].keys() else 0.0
    while len(codes) < len(pids):
        for rank in set(pids) - set(codes):
            pid, status = os.waitpid(pids[rank], os.WNOHANG)
            if pid:
                codes[rank], seconds[rank] = os.waitstatus_to_exitcode(status), time.monotonic() - clock
        saving = any(output.glob(".tmp-step-*"))
        saves, was_saving = saves + (saving and not was_saving), saving
        if signals and not due_since:
            path = output / "metrics.jsonl"
            fresh = path.exists() and path.stat().st_mtime > started
            steps = path.read_text().count("\n") if fresh else 0
            due = saves >= signals[0].get("when_saving", 0) and steps >= signals[0].get("at_step", 0)
            due = due and signals[0].get("when_ended") in (None, *codes)
            due_since = time.monotonic() if due else 0.0
        if signals and due_since and time.monotonic() - due_since >= signals[0].get("delay_s", 0):
            phases.append(phase(output, started))
            for rank in signals[0]["ranks"]:
                if rank not in codes:
                    os.kill(pids[rank], signals[0]["signal"])
            del signals[0]
            due_since = 0.0
        late = time.monotonic() - clock > request.get("limit_s", 120)
        if late or (any(codes.values()) and request.get("end_others", True)):
            for rank in set(pids) - set(codes):
                os.kill(pids[rank], 9)
                os.waitpid(pids[rank], 0)
                codes[rank], seconds[rank] = -9, time.monotonic() - clock
        time.sleep(0.004)
    texts = {}
    for rank, log in logs.items():
        log.seek(0)
        texts[rank] = log.read()
        log.close()
    order = sorted(pids)
    answer = {"codes": codes, "stderr": texts, "seconds": seconds}
    return {**{key: [values[rank] for rank in order] for key, values in answer.items()}, "phases": phases}


def warm_up() -> None:
    """Two steps on a process group without threads: what torch imports and caches on the way is in every
    fork."""
    import torch
    import torch.distributed as dist
    from tiny import MODEL, train_config
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from nemo_embed_core.data.tokenizer import load_tokenizer
    from nemo_embed_core.parallel.mesh import build_mesh
    from nemo_embed_core.train.preflight import Prepared
    from nemo_embed_core.train.trainer import Trainer

    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        config = train_config(Path(folder), steps=2, checkpoint={"async_save": False})
        mesh = build_mesh(torch.device("cpu"), 1, 1, False)
        Trainer(
            config, mesh, Prepared(MODEL, load_tokenizer(config.tokenizer)), log=lambda message: None
        ).run()
    dist.destroy_process_group()


if __name__ == "__main__":
    warm_up()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)
