"""Train an embedding model.

torchrun --nproc-per-node 8 launch/train.py --config configs/train-8b-stage1.yaml --output_dir runs/stage1
"""

import ctypes
import os
import signal
import sys
from dataclasses import replace

from nemo_embed_core.command_line import load_config
from nemo_embed_core.config import TrainConfig
from nemo_embed_core.errors import run_rank, user_errors


def train(config: TrainConfig) -> None:
    from nemo_embed_core.parallel.mesh import distributed
    from nemo_embed_core.train.preflight import prepare
    from nemo_embed_core.train.spikes import NON_FINITE_EXIT_CODE, NonFiniteError
    from nemo_embed_core.train.trainer import Trainer

    prepared = prepare(config)
    with distributed(config.parallel, config.device, prepared.model) as mesh:
        try:
            trainer = Trainer(config, mesh, prepared)
            trainer.stop_on_signals()
            trainer.run()
        except NonFiniteError:  # run() has said what it is
            raise SystemExit(NON_FINITE_EXIT_CODE) from None


def stop_with_torchrun() -> None:
    """SIGTERM, which saves and ends, when torchrun's agent dies: ranks without it would train on as nobody's
    children."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> None:
    stop_with_torchrun()
    with user_errors():
        config = load_config(TrainConfig)  # before torch is imported: a typo costs a tenth of a second
        from nemo_embed_core.data.build import with_store

        config = replace(config, data=with_store(config.data))
        from nemo_embed_core.train.early import check_early

        check_early(config)
        train(config)


if __name__ == "__main__":
    run_rank(main)
