"""Mined rows in the files that other trainers read. Our own JSONL needs no conversion.

flagembedding          JSONL {"query", "pos", "neg", "pos_scores", "neg_scores", "prompt"}
tevatron               JSONL {"query_id", "query", "positive_passages": [{"docid", "title", "text", "score"}],
                       "negative_passages"}
sentence-transformers  parquet, columns query, positive, negative_1 .. negative_n, score_positive, score_1 .. score_n
automodel              JSON {"corpus", "data"} of {"id", "score"}, beside a folder with the texts (train.parquet,
                       merlin_metadata.json)

The last three cannot hold a row without negatives, and sentence-transformers' none with fewer than n: such rows are
left out and counted in what `convert` returns. Rows pass through one by one: of the texts only a key is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nemo_embed_core.config import UserError
from nemo_embed_core.mine.corpus import write_atomically

FORMATS = ("flagembedding", "tevatron", "sentence-transformers", "automodel")
ROWS_PER_GROUP = 4096  # of a parquet file: what is in memory at once


def convert(
    mined: str | Path, output: str | Path, form: str, *, num_negatives: int = 4, prompt: str = ""
) -> dict[str, int]:
    """Write `mined` (a JSONL of launch/mine.py) at `output` in another format: {"rows": written, "left_out": not}."""
    writers = dict(zip(FORMATS, (_flagembedding, _tevatron, _sentence_transformers, _automodel), strict=True))
    if form not in writers:
        raise UserError(f"format {form!r} is none of {', '.join(FORMATS)}")
    least = {"flagembedding": 0, "sentence-transformers": num_negatives}.get(form, 1)
    counts = [len(row["neg"]) for row in _read(Path(mined))]
    num_whole = sum(count >= least for count in counts)
    if not num_whole:
        raise UserError(f"{mined}: none of {len(counts)} rows has the {least} negatives that {form} needs")
    whole = (row for row in _read(Path(mined)) if len(row["neg"]) >= least)
    writers[form](whole, Path(output), num_negatives, prompt)
    return {"rows": num_whole, "left_out": len(counts) - num_whole}


def _read(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _jsonl(rows: Iterable[dict[str, Any]], path: Path) -> None:
    write_atomically(path, ((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows))


def _flagembedding(rows: Iterable[dict[str, Any]], path: Path, num_negatives: int, prompt: str) -> None:
    _jsonl(({**row, "prompt": prompt} for row in rows), path)


def _tevatron(rows: Iterable[dict[str, Any]], path: Path, num_negatives: int, prompt: str) -> None:
    ids = _Ids()

    def passages(row: dict[str, Any], kind: str) -> list[dict[str, Any]]:
        pairs = zip(row[kind], row[f"{kind}_scores"], strict=True)
        return [{"docid": ids.of(text)[0], "title": "", "text": text, "score": score} for text, score in pairs]

    def lines() -> Iterator[dict[str, Any]]:
        for i, row in enumerate(rows):
            texts = {"positive_passages": passages(row, "pos"), "negative_passages": passages(row, "neg")}
            yield {"query_id": f"q{i}", "query": prompt + row["query"], **texts}

    _jsonl(lines(), path)


def _sentence_transformers(rows: Iterable[dict[str, Any]], path: Path, num_negatives: int, prompt: str) -> None:
    def tuples() -> Iterator[dict[str, Any]]:
        for row in rows:
            for positive, score in zip(row["pos"], row["pos_scores"], strict=True):
                yield {
                    "query": prompt + row["query"],
                    "positive": positive,
                    **{f"negative_{j + 1}": row["neg"][j] for j in range(num_negatives)},
                    **{f"score_{j + 1}": row["neg_scores"][j] for j in range(num_negatives)},
                    "score_positive": score,
                }

    _parquet(tuples(), path)


def _automodel(rows: Iterable[dict[str, Any]], path: Path, num_negatives: int, prompt: str) -> None:
    corpus = path.with_name(path.stem + "_corpus")
    corpus.mkdir(parents=True, exist_ok=True)
    ids = _Ids()
    new: list[dict[str, str]] = []

    def documents(row: dict[str, Any], kind: str) -> list[dict[str, Any]]:
        out = []
        for text, score in zip(row[kind], row[f"{kind}_scores"], strict=True):
            key, is_new = ids.of(text)
            if is_new:
                new.append({"id": key, "text": text})
            out.append({"id": key, "score": score})
        return out

    data = path.with_name(f".{path.name}.data.tmp")

    def texts() -> Iterator[dict[str, str]]:
        # One pass over the rows: their ids go to a file of their own while the texts they introduce go to the corpus.
        with open(data, "w", encoding="utf-8") as file:
            for i, row in enumerate(rows):
                question = {"question_id": f"q{i}", "question": row["query"], "corpus_id": path.stem}
                line = {**question, "pos_doc": documents(row, "pos"), "neg_doc": documents(row, "neg")}
                file.write((",\n" if i else "") + json.dumps(line, ensure_ascii=False))
                yield from new
                new.clear()

    def whole() -> Iterator[bytes]:
        yield f'{{"corpus": {json.dumps([{"path": corpus.name}])}, "data": [\n'.encode()
        with open(data, "rb") as file:
            while piece := file.read(1 << 20):
                yield piece
        yield b"\n]}\n"

    _parquet(texts(), corpus / "train.parquet")
    # The peer joins instruction and query with a space of its own.
    metadata = {
        "class": "TextQADataset",
        "corpus_id": path.stem,
        "query_instruction": prompt.removesuffix(" "),
        "passage_instruction": "",
        "task_type": "Retrieval",
    }
    write_atomically(corpus / "merlin_metadata.json", json.dumps(metadata, indent=1, ensure_ascii=False).encode())
    write_atomically(path, whole())
    data.unlink()


class _Ids:
    """d0, d1, ... for texts in the order they are met."""

    def __init__(self) -> None:
        self.numbers: dict[bytes, int] = {}

    def of(self, text: str) -> tuple[str, bool]:
        """(id, whether the text is new)."""
        key, count = hashlib.blake2b(text.encode(), digest_size=16).digest(), len(self.numbers)
        number = self.numbers.setdefault(key, count)
        return f"d{number}", number == count


def _parquet(rows: Iterable[dict[str, Any]], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    temporary, writer = path.with_name(f".{path.name}.tmp"), None
    group: list[dict[str, Any]] = []

    def flush() -> None:
        nonlocal writer
        table = pyarrow.Table.from_pylist(group)
        if writer is None:
            writer = pyarrow.parquet.ParquetWriter(temporary, table.schema)
        writer.write_table(table)
        group.clear()

    for row in rows:
        group.append(row)
        if len(group) == ROWS_PER_GROUP:
            flush()
    if group:
        flush()
    assert writer is not None, "convert refuses files without rows"
    writer.close()
    os.replace(temporary, path)
