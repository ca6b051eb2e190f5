"""Mine hard negatives: the best-scoring passages below threshold x the positive's score.

python launch/mine.py --threshold 0.95 --model runs/stage1 --data data/train.jsonl --output data/mined.jsonl
torchrun --nproc-per-node 8 launch/mine.py --config configs/mine.yaml --output data/mined.jsonl
"""

import dataclasses
from pathlib import Path

from nemo_embed_core.config import (
    DatasetConfig,
    MineConfig,
    ParallelConfig,
    UserError,
    load_config,
    run_rank,
    user_errors,
)

SUFFIXES = {"flagembedding": ".jsonl", "tevatron": ".jsonl", "sentence-transformers": ".parquet", "automodel": ".json"}


def main() -> None:
    config = load_config(MineConfig)
    with user_errors():
        from nemo_embed_core.parallel.layout import world_size_from_env
        from nemo_embed_core.parallel.mesh import distributed

        # Ranks wait for each other only at the ends of encoding and of each block of queries: hours, when one resumes.
        parallel = ParallelConfig(dp_size=world_size_from_env(), timeout_s=24 * 3600)
        with distributed(parallel, config.device) as mesh:
            mine(config, mesh)


def mine(config: MineConfig, mesh) -> None:
    from nemo_embed_core.data.prompts import query_prompt
    from nemo_embed_core.data.readers import read_beir, read_passages, read_rows
    from nemo_embed_core.embedder import Embedder
    from nemo_embed_core.mine.corpus import Ranks
    from nemo_embed_core.mine.formats import FORMATS, convert
    from nemo_embed_core.mine.negatives import Selection, mine_negatives
    from nemo_embed_core.parallel.collectives import gather_objects

    unknown = sorted(set(config.formats) - set(FORMATS))
    if unknown:
        raise UserError(f"formats={unknown}: none of {', '.join(FORMATS)}")
    rows = list(read_rows(DatasetConfig(path=config.data, split=config.split)))
    passages = []
    if Path(config.data).is_dir():  # a BEIR folder: its whole corpus, not only what the split judges relevant
        passages += read_beir(config.data, config.split).corpus.values()
    if config.corpus:
        passages += read_passages(config.corpus)
    embedder = Embedder.load(config.model, config.device, config.precision, config.max_tokens)
    mine_negatives(
        rows,
        embedder,
        config.output,
        passages=passages,
        selection=Selection(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Selection)}),
        prompt=query_prompt(config.task),
        document_prompt=query_prompt(config.document_task),
        query_max_length=config.query_max_length,
        document_max_length=config.document_max_length,
        device=mesh.device,
        method=config.method,
        ranks=Ranks(mesh.dp_rank, mesh.dp_size, gather_objects),
    )
    if mesh.rank == 0:
        for name in config.formats:
            output = f"{config.output}.{name}{SUFFIXES[name]}"
            counts = convert(
                config.output, output, name, num_negatives=config.num_negatives, prompt=query_prompt(config.task)
            )
            print(f"wrote {output}: {counts['rows']:,} rows, {counts['left_out']:,} left out (too few negatives)")


if __name__ == "__main__":
    run_rank(main)
