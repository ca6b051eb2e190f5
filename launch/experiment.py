"""A grid of ordinary runs over several seeds, and one table of it with intervals.

    python launch/experiment.py --grid configs/experiments/thresholds.yaml --output runs/thresholds
    python launch/experiment.py --grid configs/experiments/losses.yaml --output runs/losses --dry_run true
    python launch/experiment.py --grid grid.yaml --output runs/grid --only threshold=0.95 seed=1

Every step is one of the launchers, in a process of its own with its options and its log beside its product.
All cells are checked before the first run; a command that was killed goes on when it is given again. At
Ctrl-C and SIGTERM training saves where it is.
"""

import signal

from nemo_embed_core.command_line import load_config
from nemo_embed_core.config import ExperimentConfig
from nemo_embed_core.errors import user_errors


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # of a job's end: the same as Ctrl-C
    with user_errors():
        config = load_config(ExperimentConfig)
        from nemo_embed_core.experiments.run import run

        run(config)


if __name__ == "__main__":
    main()
