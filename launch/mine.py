"""Mine hard negatives: the best-scoring documents below threshold x the positive's score.

python launch/mine.py --threshold 0.95 --model runs/stage1 --data data/train.jsonl --output data/mined.jsonl
torchrun --nproc-per-node 8 launch/mine.py --config configs/mine.yaml --output data/mined.jsonl
"""

import functools

from nemo_embed_core.command_line import load_config
from nemo_embed_core.config import MineConfig, ParallelConfig
from nemo_embed_core.errors import run_rank, user_errors


def main() -> None:
    with user_errors():
        config = load_config(MineConfig)
        from nemo_embed_core.mine.corpus import Ranks
        from nemo_embed_core.mine.run import make_plan, mine, write_texts
        from nemo_embed_core.parallel.layout import rank_from_env, world_size_from_env

        is_first = rank_from_env() == 0
        say = functools.partial(print, flush=True)  # a log file shows each line when it is said
        if config.write_texts:
            if is_first:
                write_texts(config, say)
            return
        from nemo_embed_core.encoders import open_encoder
        from nemo_embed_core.parallel.collectives import gather_objects
        from nemo_embed_core.parallel.mesh import distributed

        # Ranks wait for each other only at the ends of encoding and of each block of queries: hours, when one
        # resumes.
        parallel = ParallelConfig(dp_size=world_size_from_env(), timeout_s=24 * 3600)
        with distributed(parallel, config.device) as mesh:
            how = (config.device, config.precision, config.max_tokens)
            ranks = Ranks(mesh.dp_rank, mesh.dp_size, gather_objects)
            plan = make_plan(config, say if is_first else lambda _: None, ranks)
            mine(plan, ranks, mesh.device, lambda source: open_encoder(source, *how), say)


if __name__ == "__main__":
    run_rank(main)
