"""Quality of models side by side on held-out data, a BEIR folder or a table of graded or labelled texts, each
with its own prompts, lengths and similarity.

    python launch/evaluate.py --models runs/stage1 exports/merged bm25 --data data/wiki --output wiki.json
    python launch/evaluate.py --models exports/merged --task_type sts --data data/sts.jsonl --output sts.json
    python launch/evaluate.py --compare wiki.json reports --allow prompts --output compared.json

--compare reads such reports, or folders of them, and says which differences hold: intervals, p and ranks.
"""

from nemo_embed_core.command_line import load_config
from nemo_embed_core.config import EvaluateConfig
from nemo_embed_core.errors import user_errors


def main() -> None:
    with user_errors():
        config = load_config(EvaluateConfig)
        if config.compare:
            from nemo_embed_core.evaluation.compare_page import present

            present(config)
            return
        from nemo_embed_core.evaluation.run import run

        run(config)


if __name__ == "__main__":
    main()
