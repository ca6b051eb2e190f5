"""Mined rows in the files that other trainers read. Our own JSONL needs no conversion.

The prompts stand in the texts: each peer has fields for them and ignores those under some of its options. A
document's id is the row's where it has one, else (Automodel: always, it masks equal ids over all its files)
made of the text. None of the four trains on a row without negatives, and sentence-transformers on none with
fewer than n: such rows are left out and counted in what `convert` returns. Rows pass through one by one: of
the texts only a key is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from nemo_embed_core.data.formats import automodel_ids, flagembedding, sentence_transformers, tevatron
from nemo_embed_core.data.prompts import query_prompt
from nemo_embed_core.errors import UserError
from nemo_embed_core.mine.output import digest_of, read_mined


class Format(Protocol):
    """A module of data/formats/ that is also written."""

    @property
    def SUFFIX(self) -> str: ...
    def write(
        self, path: Path, rows: Iterable[dict[str, Any]], num_negatives: int, digest: str
    ) -> None: ...  # digest: of the mined file


FORMATS: dict[str, Format] = {
    "flagembedding": flagembedding,
    "tevatron": tevatron,
    "sentence-transformers": sentence_transformers,
    "automodel": automodel_ids,
}


def convert_all(
    mined: str | Path, forms: Sequence[str], log: Callable[[str], None] = print, **options: Any
) -> dict[str, str]:
    """convert(mined, f"{mined}.{form}{suffix}", form, **options) of every form; {path: why} of failures."""
    failed: dict[str, str] = {}
    has: list[int] = []  # counted once
    for form in forms:
        path = f"{mined}.{form}{FORMATS[form].SUFFIX}"
        try:
            has = has or _num_negatives(Path(mined))
            counts = _convert(Path(mined), Path(path), form, has, **options)
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
    if form not in FORMATS:
        raise UserError(f"format {form!r} is none of {', '.join(FORMATS)}")
    has = _num_negatives(Path(mined))
    return _convert(Path(mined), Path(output), form, has, num_negatives, prompt, document_prompt)


def _num_negatives(mined: Path) -> list[int]:
    """Of each row."""
    return [len(row["neg"]) for row in read_mined(mined)]


def _convert(
    mined: Path,
    output: Path,
    form: str,
    has: list[int],
    num_negatives: int = 4,
    prompt: str = "",
    document_prompt: str = "",
) -> dict[str, int]:
    """has: _num_negatives(mined), which of a dataset folder reads its corpus as every format does."""
    least = num_negatives if form == "sentence-transformers" else 1
    num_whole = sum(count >= least for count in has)
    if not num_whole:
        raise UserError(
            f"{mined}: none of {len(has)} rows has the {least} negatives that {form} needs; the most is "
            f"{max(has, default=0)}: mine with a higher threshold or a smaller num_negatives"
        )
    whole = (row for row in read_mined(mined) if len(row["neg"]) >= least)
    prompted = (_prompted(row, prompt, document_prompt) for row in whole)
    FORMATS[form].write(output, prompted, num_negatives, digest_of(mined))
    return {"rows": num_whole, "left_out": len(has) - num_whole}


def _prompted(row: dict[str, Any], prompt: str, document_prompt: str) -> dict[str, Any]:
    documents = {kind: [document_prompt + text for text in row[kind]] for kind in ("pos", "neg")}
    own = query_prompt(row["prompt"]) if "prompt" in row else prompt
    return {**row, "query": own + row["query"], **documents}
