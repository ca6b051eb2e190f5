"""Mined rows in the files that other trainers read. Our own JSONL needs no conversion.

flagembedding          JSONL {"query", "pos", "neg", "pos_scores", "neg_scores", "prompt": ""}
tevatron               JSONL {"query_id", "query", "positive_passages", "negative_passages"}, each a list of
                       {"docid", "text", "score"}
sentence-transformers  parquet, columns query, positive, negative_1 .. negative_n, scores (of positive and
                       negatives), as its own mine_hard_negatives writes them; some losses learn from `scores`
automodel              JSON {"corpus", "data"} of {"id", "score"}, beside a folder of texts (train.parquet)

The prompts stand in the texts: each peer has fields for them and ignores those under some of its options. A
document's id is the row's where it has one, else (Automodel: always, it masks equal ids over all its files)
made of the text. None of the four trains on a row without negatives, and sentence-transformers on none with
fewer than n: such rows are left out and counted in what `convert` returns. Rows pass through one by one: of
the texts only a key is kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_embed_core.data.prompts import query_prompt
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.durable import replacing, write_atomically
from nemo_embed_core.mine.output import digest_of, read_mined

SUFFIXES = {
    "flagembedding": ".jsonl",
    "tevatron": ".jsonl",
    "sentence-transformers": ".parquet",
    "automodel": ".json",
}
FORMATS = tuple(SUFFIXES)
ROWS_PER_GROUP, CHARACTERS_PER_GROUP = 4096, 32 << 20  # of a parquet file, at most: what is in memory at once


def convert_all(
    mined: str | Path, forms: Sequence[str], log: Callable[[str], None] = print, **options: Any
) -> dict[str, str]:
    """convert(mined, f"{mined}.{form}{suffix}", form, **options) of every form; {path: why} of failures."""
    failed = {}
    for form in forms:
        path = f"{mined}.{form}{SUFFIXES[form]}"
        try:
            counts = convert(mined, path, form, **options)
        except (UserError, OSError) as error:
            failed[path] = str(error)
            log(f"{path} is not written: {error}")
        else:
            log(f"wrote {path}: {counts['rows']:,} rows, {counts['left_out']:,} left out (too few negatives)")
    return failed


def convert(
    mined: str | Path,
    output: str | Path,
    form: str,
    *,
    num_negatives: int = 4,
    prompt: str = "",
    document_prompt: str = "",
) -> dict[str, int]:
    """Write `mined` (a JSONL of launch/mine.py) at `output` in another format: {"rows", "left_out"} counted.

    prompt, document_prompt: put before every query and every document.
    """
    writers = dict(zip(FORMATS, (_flagembedding, _tevatron, _sentence_transformers, _automodel), strict=True))
    if form not in writers:
        raise UserError(f"format {form!r} is none of {', '.join(FORMATS)}")
    least = num_negatives if form == "sentence-transformers" else 1
    counts = [len(row["neg"]) for row in read_mined(Path(mined))]
    num_whole = sum(count >= least for count in counts)
    if not num_whole:
        raise UserError(
            f"{mined}: none of {len(counts)} rows has the {least} negatives that {form} needs; the most is "
            f"{max(counts, default=0)}: mine with a higher threshold or a smaller num_negatives"
        )
    whole = (row for row in read_mined(Path(mined)) if len(row["neg"]) >= least)
    prompted = (_prompted(row, prompt, document_prompt) for row in whole)
    writers[form](prompted, Path(output), num_negatives, digest_of(Path(mined)))
    return {"rows": num_whole, "left_out": len(counts) - num_whole}


def _prompted(row: dict[str, Any], prompt: str, document_prompt: str) -> dict[str, Any]:
    documents = {kind: [document_prompt + text for text in row[kind]] for kind in ("pos", "neg")}
    own = query_prompt(row["prompt"]) if "prompt" in row else prompt
    return {**row, "query": own + row["query"], **documents}


def _document_id(text: str) -> str:
    """The same for the same text in every file, so that files may be trained on together."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _jsonl(rows: Iterable[dict[str, Any]], path: Path) -> None:
    write_atomically(path, ((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows))


def _flagembedding(rows: Iterable[dict[str, Any]], path: Path, num_negatives: int, digest: str) -> None:
    fields = ("query", "pos", "neg", "pos_scores", "neg_scores")
    # Empty, and not left out: else its query_instruction_for_retrieval comes before our prompt.
    _jsonl(({**{field: row[field] for field in fields}, "prompt": ""} for row in rows), path)


def _tevatron(rows: Iterable[dict[str, Any]], path: Path, num_negatives: int, digest: str) -> None:
    def passages(row: dict[str, Any], kind: str) -> list[dict[str, Any]]:
        ids = row.get(f"{kind}_ids") or map(_document_id, row[kind])
        # No "title", not even an empty one: the peer would put a space behind it, in front of the text.
        triples = zip(ids, row[kind], row[f"{kind}_scores"], strict=True)
        return [{"docid": key, "text": text, "score": score} for key, text, score in triples]

    def lines() -> Iterator[dict[str, Any]]:
        for i, row in enumerate(rows):
            texts = {"positive_passages": passages(row, "pos"), "negative_passages": passages(row, "neg")}
            yield {"query_id": str(row.get("id", f"q{i}")), "query": row["query"], **texts}

    _jsonl(lines(), path)


def _sentence_transformers(
    rows: Iterable[dict[str, Any]], path: Path, num_negatives: int, digest: str
) -> None:
    def tuples() -> Iterator[dict[str, Any]]:
        for row in rows:
            for positive, score in zip(row["pos"], row["pos_scores"], strict=True):
                yield {
                    "query": row["query"],
                    "positive": positive,
                    **{f"negative_{j + 1}": row["neg"][j] for j in range(num_negatives)},
                    "scores": [score, *row["neg_scores"][:num_negatives]],
                }

    _parquet(tuples(), path)


def _automodel(rows: Iterable[dict[str, Any]], path: Path, num_negatives: int, digest: str) -> None:
    corpus = path.with_name(path.stem + "_corpus")
    corpus.mkdir(parents=True, exist_ok=True)
    # The peer refuses two folders under one corpus_id, and files of one name in several folders are common.
    corpus_id = f"{path.stem}-{digest[:8]}"
    seen: set[bytes] = set()
    new: list[dict[str, str]] = []

    def documents(row: dict[str, Any], kind: str) -> list[dict[str, Any]]:
        out = []
        for text, score in zip(row[kind], row[f"{kind}_scores"], strict=True):
            key = _document_id(text)
            if (raw := bytes.fromhex(key)) not in seen:
                seen.add(raw)
                new.append({"id": key, "text": text})
            out.append({"id": key, "score": score})
        return out

    data = path.with_name(f".{path.name}.data.tmp")

    def texts() -> Iterator[dict[str, str]]:
        # One pass over the rows: ids go to a file of their own while their new texts go to the corpus.
        with open(data, "w", encoding="utf-8") as file:
            for i, row in enumerate(rows):
                question = {"question_id": str(row.get("id", f"q{i}")), "question": row["query"]}
                lists = {"pos_doc": documents(row, "pos"), "neg_doc": documents(row, "neg")}
                line = {**question, "corpus_id": corpus_id, **lists}
                file.write((",\n" if i else "") + json.dumps(line, ensure_ascii=False))
                yield from new
                new.clear()

    def whole() -> Iterator[bytes]:
        yield f'{{"corpus": {json.dumps([{"path": corpus.name}])}, "data": [\n'.encode()
        with open(data, "rb") as file:
            while piece := file.read(1 << 20):
                yield piece
        yield b"\n]}\n"

    metadata = {
        "class": "TextQADataset",
        "corpus_id": corpus_id,
        "query_instruction": "",
        "passage_instruction": "",
        "task_type": "Retrieval",
    }
    try:
        _parquet(texts(), corpus / "train.parquet")
        described = json.dumps(metadata, indent=1, ensure_ascii=False)
        write_atomically(corpus / "merlin_metadata.json", described.encode())
        write_atomically(path, whole())
    finally:
        data.unlink(missing_ok=True)


def _parquet(rows: Iterable[dict[str, Any]], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    writer = None
    group: list[dict[str, Any]] = []
    size = 0
    with replacing(path) as temporary:

        def flush() -> None:
            nonlocal writer, size
            table = pyarrow.Table.from_pylist(group)
            if writer is None:
                writer = pyarrow.parquet.ParquetWriter(temporary, table.schema)
            writer.write_table(table)
            group.clear()
            size = 0

        for row in rows:
            group.append(row)
            size += sum(len(value) for value in row.values())
            if len(group) == ROWS_PER_GROUP or size >= CHARACTERS_PER_GROUP:
                flush()
        if group:
            flush()
        assert writer is not None, "convert refuses files without rows"
        writer.close()
