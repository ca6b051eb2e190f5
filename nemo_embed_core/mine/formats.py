"""Mined rows in the files that other trainers read. Our own JSONL needs no conversion.

flagembedding          JSONL {"query", "pos", "neg", "pos_scores", "neg_scores", "prompt"}
tevatron               JSONL {"query_id", "query", "positive_passages": [{"docid", "title", "text"}], "negative_passages"}
sentence-transformers  parquet, columns query, positive, negative_1 .. negative_n, score_positive, score_1 .. score_n
automodel              JSON {"corpus", "data"} of ids, beside a folder with the texts (train.parquet, merlin_metadata.json)

The last three cannot hold a row without negatives, and sentence-transformers' none with fewer than n: such rows are
left out and counted in what `convert` returns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_embed_core.config import UserError
from nemo_embed_core.mine.corpus import write_atomically

FORMATS = ("flagembedding", "tevatron", "sentence-transformers", "automodel")


def convert(
    mined: str | Path, output: str | Path, form: str, *, num_negatives: int = 4, prompt: str = ""
) -> dict[str, int]:
    """Write `mined` (a JSONL of launch/mine.py) at `output` in another format: {"rows": written, "left_out": not}."""
    writers = dict(zip(FORMATS, (_flagembedding, _tevatron, _sentence_transformers, _automodel), strict=True))
    if form not in writers:
        raise UserError(f"format {form!r} is none of {', '.join(FORMATS)}")
    least = {"flagembedding": 0, "sentence-transformers": num_negatives}.get(form, 1)
    rows = list(_read(Path(mined)))
    whole = [row for row in rows if len(row["neg"]) >= least]
    if not whole:
        raise UserError(f"{mined}: none of {len(rows)} rows has the {least} negatives that {form} needs")
    writers[form](whole, Path(output), num_negatives, prompt)
    return {"rows": len(whole), "left_out": len(rows) - len(whole)}


def _read(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _jsonl(rows: list[dict[str, Any]], path: Path) -> None:
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _flagembedding(rows: list[dict[str, Any]], path: Path, num_negatives: int, prompt: str) -> None:
    _jsonl([{**row, "prompt": prompt} for row in rows], path)


def _tevatron(rows: list[dict[str, Any]], path: Path, num_negatives: int, prompt: str) -> None:
    ids = _Ids()

    def passages(texts: list[str]) -> list[dict[str, str]]:
        return [{"docid": ids.of(text), "title": "", "text": text} for text in texts]

    out = []
    for i, row in enumerate(rows):
        texts = {"positive_passages": passages(row["pos"]), "negative_passages": passages(row["neg"])}
        out.append({"query_id": f"q{i}", "query": prompt + row["query"], **texts})
    _jsonl(out, path)


def _sentence_transformers(rows: list[dict[str, Any]], path: Path, num_negatives: int, prompt: str) -> None:
    columns: dict[str, list[Any]] = {"query": [], "positive": []}
    for name in ("negative", "score"):
        columns |= {f"{name}_{j}": [] for j in range(1, num_negatives + 1)}
    columns["score_positive"] = []
    for row in rows:
        for positive, score in zip(row["pos"], row["pos_scores"], strict=True):
            columns["query"].append(prompt + row["query"])
            columns["positive"].append(positive)
            columns["score_positive"].append(score)
            for j in range(num_negatives):
                columns[f"negative_{j + 1}"].append(row["neg"][j])
                columns[f"score_{j + 1}"].append(row["neg_scores"][j])
    _parquet(columns, path)


def _automodel(rows: list[dict[str, Any]], path: Path, num_negatives: int, prompt: str) -> None:
    corpus = path.with_name(path.stem + "_corpus")
    corpus.mkdir(parents=True, exist_ok=True)
    ids, data = _Ids(), []
    for i, row in enumerate(rows):
        documents = {f"{kind}_doc": [{"id": ids.of(text)} for text in row[kind]] for kind in ("pos", "neg")}
        data.append({"question_id": f"q{i}", "question": row["query"], "corpus_id": path.stem, **documents})
    _parquet({"id": list(ids.numbers.values()), "text": list(ids.numbers)}, corpus / "train.parquet")
    # The peer joins instruction and query with a space of its own.
    metadata = {
        "class": "TextQADataset",
        "corpus_id": path.stem,
        "query_instruction": prompt.removesuffix(" "),
        "passage_instruction": "",
        "task_type": "Retrieval",
    }
    write_atomically(corpus / "merlin_metadata.json", json.dumps(metadata, indent=1, ensure_ascii=False).encode())
    whole = {"corpus": [{"path": corpus.name}], "data": data}
    write_atomically(path, json.dumps(whole, ensure_ascii=False).encode())


class _Ids:
    """d0, d1, ... for texts in the order they are met."""

    def __init__(self) -> None:
        self.numbers: dict[str, str] = {}

    def of(self, text: str) -> str:
        return self.numbers.setdefault(text, f"d{len(self.numbers)}")


def _parquet(columns: dict[str, list[Any]], path: Path) -> None:
    import io

    import pyarrow
    import pyarrow.parquet

    data = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), data)
    write_atomically(path, data.getvalue())
