"""bf16 on a CPU keeps memory for every shape it meets (oneDNN): training and encoding must meet few."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tiny import train_config

# Argument 1: the folder of a run. Prints the resident memory in MiB after 40 and after 160 steps, then the
# same for encoding.
SCRIPT = """
import dataclasses, random, sys
from pathlib import Path
import numpy as np
import torch
from tiny import MODEL, train_config
from nemo_embed_core.encoders.embedder import Embedder
from nemo_embed_core.parallel.mesh import distributed
from nemo_embed_core.train.preflight import prepare
from nemo_embed_core.train.trainer import Trainer

torch.set_num_threads(1)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

changes = {"steps": 1000, "precision": "bf16", "data": {"max_tokens": 2048}, "on_spike": "ignore"}
config = train_config(Path(sys.argv[1]), **changes)
with distributed(config.parallel, "cpu", MODEL) as mesh:
    trainer = Trainer(config, mesh, prepare(config), log=lambda message: None)
    shapes, forward = set(), trainer.engine.model.forward
    trainer.engine.model.forward = lambda ids, *rest: (shapes.add(len(ids)), forward(ids, *rest))[1]
    for step in range(160):
        trainer.train_step()
        if step == 40:
            print(resident(), file=sys.stderr)
    print(resident(), file=sys.stderr)
    trainer.save()
    trainer.close()
assert len(shapes) < 45, len(shapes)
embedder = Embedder.load(config.output_dir, "cpu", "bf16", max_tokens=4096)
rng = np.random.default_rng(0)
for call in range(160):
    lengths = rng.integers(2, 400, rng.integers(1, 12))
    embedder.encode_tokens([rng.integers(5, 300, n).astype(np.int32) for n in lengths])
    if call == 40:
        print(resident(), file=sys.stderr)
print(resident(), file=sys.stderr)
"""


def test_resident_memory_stays_flat_over_500_shapes(tmp_path: Path) -> None:
    train_config(tmp_path)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    numbers = [float(line) for line in result.stderr.splitlines() if line.replace(".", "").isdigit()]
    print(json.dumps(numbers))
    training, encoding = numbers[1] - numbers[0], numbers[3] - numbers[2]
    assert training < 40 and encoding < 40, (
        f"120 more steps took {training:.0f} MiB, 120 more calls {encoding:.0f} MiB"
    )
