"""Quality of models side by side on held-out data, each with its own prompts, lengths and similarity.

    python launch/evaluate.py --models runs/stage1 exports/merged bm25 --data data/wiki --output wiki.json
    python launch/evaluate.py --models exports/merged --task_type sts --data data/sts.jsonl --output sts.json
    python launch/evaluate.py --models exports/merged --tasks NanoBEIR STS12 --mirror hub --output reports
    torchrun --nproc-per-node 8 launch/evaluate.py --config configs/evaluate-tasks.yaml
    python launch/evaluate.py --compare wiki.json reports --allow prompts --output compared.json

--compare reads such reports, or folders of them, and says which differences hold: intervals, p and ranks.
"""

from nemo_embed_core.command_line import load_config
from nemo_embed_core.config import EvaluateConfig, ParallelConfig
from nemo_embed_core.errors import run_rank, user_errors


def main() -> None:
    with user_errors():
        config = load_config(EvaluateConfig)
        if config.compare:
            from nemo_embed_core.evaluation.compare_page import present

            present(config)
            return
        from nemo_embed_core.evaluation.run import run
        from nemo_embed_core.parallel.layout import world_size_from_env
        from nemo_embed_core.parallel.mesh import distributed

        # Ranks wait for each other at every piece of texts; scoring and searching stand between.
        parallel = ParallelConfig(dp_size=world_size_from_env(), timeout_s=24 * 3600)
        with distributed(parallel, config.device):
            run(config)


if __name__ == "__main__":
    run_rank(main)
