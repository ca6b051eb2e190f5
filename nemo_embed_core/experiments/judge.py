"""How many mined negatives are relevant after all: python -m nemo_embed_core.experiments.judge --mined ...

The false negatives of a threshold are what it costs, and training cannot see them: labels that mining was not
given, or a cross-encoder, count them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from nemo_embed_core.command_line import load_config
from nemo_embed_core.config import DatasetConfig, JudgeConfig
from nemo_embed_core.data.normal_form import normal_form
from nemo_embed_core.errors import UserError, user_errors
from nemo_embed_core.files.durable import probe_file, write_atomically

Row = dict[str, Any]


def judge(config: JudgeConfig, say: Callable[[str], None] = print) -> dict[str, Any]:
    """{"rows", "without", "negatives", "relevant", "share"}: of the rows those without negatives, of the
    negatives those that are relevant."""
    from nemo_embed_core.mine.output import read_mined

    probe_file(Path(config.output))
    rows = list(islice(read_mined(Path(config.mined)), config.max_rows or None))
    if not rows:
        raise UserError(f"{config.mined} has no rows")
    relevant = by_labels(config, rows) if config.labels else by_cross_encoder(config, rows)
    negatives, found = sum(len(row["neg"]) for row in rows), sum(relevant)
    report = {
        **{"rows": len(rows), "without": sum(not row["neg"] for row in rows), "negatives": negatives},
        **{"relevant": found, "share": found / negatives if negatives else 0.0},
    }
    write_atomically(Path(config.output), f"{json.dumps(report, indent=1)}\n".encode())
    say(f"{found:,} of {negatives:,} negatives of {len(rows):,} rows are relevant: {report['share']:.2%}")
    return report


def by_labels(config: JudgeConfig, rows: list[Row]) -> Iterator[int]:
    """Of each row the negatives whose text the labels call relevant to the text of its query."""
    from nemo_embed_core.data.readers import Findings, read_beir
    from nemo_embed_core.data.texts import texts_in

    findings = Findings(log=print)
    with texts_in(config.output):
        beir = read_beir(DatasetConfig(path=config.labels, split=config.split), findings)
    findings.raise_bad()
    relevant: dict[str, set[str]] = {}
    for query, judged in beir.qrels.items():
        texts = {normal_form(beir.corpus[d]) for d, grade in judged.items() if grade > 0 and d in beir.corpus}
        relevant.setdefault(normal_form(beir.queries[query]), set()).update(texts)
    queries = [normal_form(row["query"]) for row in rows]
    if unknown := [row["query"] for row, query in zip(rows, queries, strict=True) if query not in relevant]:
        raise UserError(
            f"{config.labels}, split {config.split}: {len(unknown)} of {len(rows)} mined queries have no "
            f"judgements there, first {unknown[0][:60]!r}; give labels of the queries that were mined"
        )
    for row, query in zip(rows, queries, strict=True):
        yield sum(normal_form(text) in relevant[query] for text in row["neg"])


def by_cross_encoder(config: JudgeConfig, rows: list[Row]) -> Iterator[int]:
    """Of each row the negatives that score at least as high as its lowest positive."""
    from sentence_transformers import CrossEncoder

    from nemo_embed_core.parallel.mesh import pick_device

    model = CrossEncoder(config.cross_encoder, device=str(pick_device(config.device)), local_files_only=True)
    if model.num_labels != 1:
        raise UserError(f"{config.cross_encoder} gives {model.num_labels} scores a pair: one is needed")
    pairs = [(row["query"], text) for row in rows for text in (*row["pos"], *row["neg"])]
    scores = iter(model.predict(pairs, show_progress_bar=False).tolist())
    for row in rows:
        lowest = min(islice(scores, len(row["pos"])))
        yield sum(score >= lowest for score in islice(scores, len(row["neg"])))


def main() -> None:
    with user_errors():
        judge(load_config(JudgeConfig))


if __name__ == "__main__":
    main()
