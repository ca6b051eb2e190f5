"""Trains in forked processes on request, so that a crash test pays for `import torch` once.

Reads one JSON object per line: {"config": {...TrainConfig...}, "world_size": n, "fail": "step.begin@3" or ""} and answers
with {"codes": [exit status of each rank]}; a rank killed by SIGKILL has -9.
"""

import json
import os
import socket
import sys
import traceback


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


def train(values: dict) -> int:
    import torch

    from nemo_embed_core.config import UserError
    from nemo_embed_core.parallel.mesh import distributed
    from nemo_embed_core.train.trainer import NonFiniteError, Trainer, prepare

    torch.set_num_threads(1)
    config = build_config(values)
    try:
        prepared = prepare(config)
        with distributed(config.parallel, config.device, prepared.model) as mesh:
            Trainer(config, mesh, prepared).run()
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        return 2
    except NonFiniteError as error:
        print(error, file=sys.stderr, flush=True)
        return 4
    return 0


def run(request: dict) -> list[int]:
    world_size = request["world_size"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
            os.environ.update({k: str(v) for k, v in env.items()}, MASTER_PORT=str(port))
            if rank == request.get("fail_rank", 0):
                os.environ["NEMO_EMBED_FAIL"] = request.get("fail", "")
            os.dup2(2, 1)  # stdout is the answer channel
            code = 1
            try:
                code = train(request["config"])
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        pids.append(pid)
    codes = {}
    while len(codes) < world_size:
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] != 0:  # torchrun's behaviour: one failed worker ends the others
            for other in set(pids) - set(codes):
                os.kill(other, 9)
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    import torch

    del torch
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(json.dumps({"codes": run(json.loads(line))}), file=answers, flush=True)
