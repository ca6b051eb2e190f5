"""Training and evaluation data as written by people, read strictly: a bad row stops with `path:line: what and why`.

Two formats, plain or .gz:
- JSONL rows {"query": str, "pos": [str, ...], "neg": [str, ...]};
- a BEIR folder: corpus.jsonl, queries.jsonl, qrels/{split}.tsv.

Nothing is skipped, repaired or cast in silence (docs/data-formats.md has the list).
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nemo_embed_core.config import DataError, DatasetConfig, UserError
from nemo_embed_core.data.texts import Texts, TextsById

MAX_LINE = 16 << 20  # bytes; longer is a broken file, not a row


class Row(NamedTuple):
    """One training row, texts as they are in the file (no instruction); line: where it stands (of a qrels file: BEIR)."""

    query: str
    pos: list[str]
    neg: list[str]
    path: str
    line: int
    lang: str = ""  # of the query, where the file says so: only reports group by it
    id: str = ""  # the row's own; of a BEIR folder the query's _id
    group: str = ""  # its class: documents of the same group are not negatives of each other
    pos_ids: Sequence[str] = ()  # of the documents, one per text where the file has them
    neg_ids: Sequence[str] = ()


class Beir(NamedTuple):
    """One split of a BEIR folder. corpus: id -> `title + " " + text`; queries: those with judgements in the split.

    What read_beir returns has its texts on disk (data/texts.py).
    """

    corpus: Mapping[str, str]
    queries: Mapping[str, str]
    qrels: dict[str, dict[str, int]]


def read_rows(config: DatasetConfig) -> Iterator[Row]:
    """The rows of a JSONL file or of a BEIR split (one row per query: all documents with score > 0, no negatives)."""
    path = Path(config.path)
    if path.is_dir():
        yield from _beir_rows(path, config.split)
    else:
        yield from _jsonl_rows(path)


def source_files(config: DatasetConfig) -> list[Path]:
    """The files that read_rows(config) reads, in a fixed order."""
    path = Path(config.path)
    if not path.is_dir():
        _check_file(path)
        return [path]
    return [_beir_file(path, "corpus.jsonl"), _beir_file(path, "queries.jsonl"), _qrels_file(path, config.split)]


# ------------------------------------------------------------------------------------------ JSONL rows

REQUIRED = ("query", "pos", "neg")
OPTIONAL = ("pos_scores", "neg_scores", "id", "lang", "group", "pos_ids", "neg_ids")
ALLOWED = frozenset(REQUIRED + OPTIONAL)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    name = str(path)
    ids: dict[str, int] = {}
    line = 0
    for line, row in _json_lines(path):
        try:
            unknown = sorted(row.keys() - ALLOWED)
            if unknown:
                hint = "; set the instruction with the dataset's task option" if "prompt" in unknown else ""
                raise ValueError(
                    f"unknown fields {_short(unknown)}: remove them (allowed: {', '.join(REQUIRED + OPTIONAL)}){hint}"
                )
            query = _text(row, "query")
            pos, neg = _texts(row, "pos"), _texts(row, "neg")
            if not pos:
                raise ValueError("field 'pos' is empty: every query needs at least one positive text")
            both = set(pos).intersection(neg)
            if both:
                raise ValueError(
                    f"pos[{pos.index(next(t for t in pos if t in both))}] is also "
                    f"neg[{neg.index(next(t for t in pos if t in both))}]: remove it from 'neg' (the loss would push "
                    "the positive away)"
                )
            for scores, texts in (("pos_scores", pos), ("neg_scores", neg)):
                if scores in row:
                    _check_scores(row[scores], scores, len(texts))
            key = ""
            if "id" in row:
                key = _id(row["id"], "id")
                if key in ids:
                    raise ValueError(f"id {_short(key)} is already the id of line {ids[key]}: make ids unique")
                ids[key] = line
            lang = row.get("lang", "")
            if not isinstance(lang, str):
                raise ValueError(f"field 'lang' must be a string such as \"de\", got {_type(lang)}")
            group = _id(row["group"], "group") if "group" in row else ""
            pos_ids, neg_ids = _document_ids(row, "pos_ids", len(pos)), _document_ids(row, "neg_ids", len(neg))
        except ValueError as error:
            raise DataError(path, line, str(error)) from None
        yield Row(query, pos, neg, name, line, lang, key, group, pos_ids, neg_ids)
    if line == 0:
        raise DataError(path, 1, "the file is empty: at least one row is needed")


def _texts(row: dict[str, Any], field: str) -> list[str]:
    value = row.get(field)
    if field not in row:
        fix = 'write "neg": [] when there are none' if field == "neg" else 'add "pos": ["..."]'
        raise ValueError(f"field {field!r} is missing: {fix}")
    if not isinstance(value, list):
        raise ValueError(f"field {field!r} must be a list of strings, got {_type(value)}")
    return [_check_text(text, f"{field}[{i}]") for i, text in enumerate(value)]


def _document_ids(row: dict[str, Any], field: str, count: int) -> list[str]:
    if field not in row:
        return []
    value = row[field]
    if not isinstance(value, list) or len(value) != count:
        got = f"{len(value)} entries" if isinstance(value, list) else _type(value)
        raise ValueError(f"field {field!r} must be a list of {count} ids (one per text), got {got}")
    return [_id(key, f"{field}[{i}]") for i, key in enumerate(value)]


def _check_scores(value: Any, field: str, count: int) -> None:
    if not isinstance(value, list) or len(value) != count:
        got = f"{len(value)} entries" if isinstance(value, list) else _type(value)
        raise ValueError(f"field {field!r} must be a list of {count} numbers (one per text), got {got}")
    for i, score in enumerate(value):
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise ValueError(f"{field}[{i}] must be a finite number, got {_short(score)}")


def read_passages(path: str | Path) -> Iterator[str]:
    """The passages of a candidate pool: JSONL lines {"text": str, "title"?: str, ...}, one passage a line."""
    line = 0
    for line, row in _json_lines(Path(path)):
        try:
            text = _passage(row)
        except ValueError as error:
            raise DataError(path, line, str(error)) from None
        yield text
    if line == 0:
        raise DataError(path, 1, "the file is empty: at least one line is needed")


# ------------------------------------------------------------------------------------------ BEIR folders


def read_beir(path: str | Path, split: str) -> Beir:
    """A whole split: every corpus text, the queries that the split judges, qrels[query id][document id] = score."""
    folder = _beir_folder(Path(path))
    qrels, lines = _read_qrels(_qrels_file(folder, split))
    queries = _read_texts(_beir_file(folder, "queries.jsonl"), keep=qrels.__contains__)
    corpus = _read_texts(_beir_file(folder, "corpus.jsonl"), keep=lambda _: True)
    _check_dangling(folder, split, qrels, lines, queries, corpus)
    return Beir(corpus, TextsById({qid: queries.indices[qid] for qid in qrels}, queries.texts), qrels)


def _beir_rows(folder: Path, split: str) -> Iterator[Row]:
    """One row per judged query in the order of the qrels, made when it is asked for: the texts stand on disk."""
    folder = _beir_folder(folder)
    file = _qrels_file(folder, split)
    qrels, lines = _read_qrels(file)
    needed = {doc for scores in qrels.values() for doc, score in scores.items() if score > 0}
    languages: dict[str, str] = {}
    queries = _read_texts(_beir_file(folder, "queries.jsonl"), qrels.__contains__, languages)
    corpus = _read_texts(_beir_file(folder, "corpus.jsonl"), keep=needed.__contains__)
    _check_dangling(folder, split, qrels, lines, queries, corpus)
    for qid, scores in qrels.items():
        line = lines[qid, next(iter(scores))]
        pos_ids = [doc for doc, score in scores.items() if score > 0]
        pos = [corpus[doc] for doc in pos_ids]
        if not pos:
            raise DataError(
                file, line, f"query {_short(qid)} has no document with a score above 0: remove its judgements "
                "from this training split or give it a positive"
            )  # fmt: skip
        yield Row(queries[qid], pos, [], str(file), line, languages.get(qid, ""), qid, pos_ids=pos_ids)


def _read_texts(path: Path, keep: Callable[[str], bool], languages: dict[str, str] | None = None) -> TextsById:
    """{id: text} of a corpus or queries file in file order, every line checked; text "" where keep(id) is False.

    languages: gets {id: lang} of the lines that say so.
    """
    texts = TextsById({}, Texts())
    nothing = texts.texts.append("")
    for line, row in _json_lines(path):
        try:
            if "_id" not in row:
                raise ValueError("field '_id' is missing")
            key = _id(row["_id"], "_id")
            if key in texts:
                # One entry per line, in order: the position is the line.
                first = next(i for i, k in enumerate(texts, 1) if k == key)
                raise ValueError(f"_id {_short(key)} is already the _id of line {first}: make ids unique")
            text = _passage(row)
        except ValueError as error:
            raise DataError(path, line, str(error)) from None
        texts.indices[key] = texts.texts.append(text) if keep(key) else nothing
        if languages is not None and keep(key) and isinstance(lang := row.get("lang"), str):
            languages[key] = lang
    if not texts:
        raise DataError(path, 1, "the file is empty: at least one line is needed")
    return texts


def _passage(row: dict[str, Any]) -> str:
    """`title + " " + text` where there is a title, as BEIR's own code joins them."""
    text, title = row.get("text"), row.get("title", "")
    if not isinstance(text, str):
        raise ValueError(
            f"field 'text' must be a string, got {_type(text)}" if "text" in row else "field 'text' is missing"
        )
    if not isinstance(title, str):
        raise ValueError(f"field 'title' must be a string, got {_type(title)}: leave it out when there is none")
    if title.strip():
        text = f"{title} {text}" if text.strip() else title
    return _check_text(text, "text")


def _read_qrels(path: Path) -> tuple[dict[str, dict[str, int]], dict[tuple[str, str], int]]:
    """(qrels[query id][document id] = score, line of every pair), in file order."""
    qrels: dict[str, dict[str, int]] = {}
    lines: dict[tuple[str, str], int] = {}
    for line, raw in _raw_lines(path):
        try:
            cells = _decode(raw).rstrip("\r\n").split("\t")
            if cells == [""]:
                raise ValueError("blank line: remove it")
            if len(cells) != 3:
                four = " (a TREC qrels file? drop its second column)" if len(cells) == 4 else ""
                raise ValueError(f"expected 3 tab-separated columns query-id, corpus-id, score, got {len(cells)}{four}")
            if line == 1:
                if re.fullmatch(r"-?\d+", cells[2].strip()):
                    raise ValueError("no header: put query-id<TAB>corpus-id<TAB>score on line 1")
                continue
            qid, doc = _id(cells[0], "query-id"), _id(cells[1], "corpus-id")
            if not re.fullmatch(r"-?\d{1,9}", cells[2], re.ASCII):
                raise ValueError(f"score must be an integer, got {_short(cells[2])}")
            if (qid, doc) in lines:
                raise ValueError(f"pair {_short(qid)}, {_short(doc)} is already on line {lines[qid, doc]}: keep one")
            lines[qid, doc] = line
            qrels.setdefault(qid, {})[doc] = int(cells[2])
        except ValueError as error:
            raise DataError(path, line, str(error)) from None
    if not qrels:
        raise DataError(path, 1, "no judgements: a header line and at least one query-id<TAB>corpus-id<TAB>score")
    return qrels, lines


def _check_dangling(
    folder: Path,
    split: str,
    qrels: dict[str, dict[str, int]],
    lines: dict[tuple[str, str], int],
    queries: Mapping[str, str],
    corpus: Mapping[str, str],
) -> None:
    """DataError at the first judgement whose query or document does not exist, with the count of all of them."""
    bad = [pair for pair in lines if pair[0] not in queries or pair[1] not in corpus]
    if bad:
        qid, doc = bad[0]
        what = f"query {_short(qid)} is not in queries.jsonl ({len(queries)} queries)"
        if qid in queries:
            what = f"document {_short(doc)} is not in corpus.jsonl ({len(corpus)} documents)"
        raise DataError(
            _qrels_file(folder, split), lines[bad[0]],
            f"{what}; {len(bad)} of {len(lines)} judgements dangle: remove them or add the texts",
        )  # fmt: skip


def _beir_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: a BEIR folder holds corpus.jsonl, queries.jsonl and qrels/")
    return folder


def _beir_file(folder: Path, name: str) -> Path:
    """folder/name or folder/name.gz; both or none is an error."""
    found = [file for file in (folder / name, folder / f"{name}.gz") if file.is_file()]
    if len(found) == 2:
        raise UserError(f"{folder} has both {name} and {name}.gz: remove one")
    if not found:
        holds = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) if folder.is_dir() else ""
        raise UserError(f"{folder / name} (or .gz) does not exist; the folder holds: {holds or 'nothing'}")
    return found[0]


def _qrels_file(folder: Path, split: str) -> Path:
    if not re.fullmatch(r"\w[\w.-]*", split):
        raise UserError(f"split {split!r} is not a plain name like train or test")
    qrels = folder / "qrels"
    found = [file for file in (qrels / f"{split}.tsv", qrels / f"{split}.tsv.gz") if file.is_file()]
    if len(found) == 2:
        raise UserError(f"{qrels} has both {split}.tsv and {split}.tsv.gz: remove one")
    if not found:
        splits = sorted({p.name.removesuffix(".gz").removesuffix(".tsv") for p in qrels.glob("*.tsv*")})
        raise UserError(
            f"{qrels / split}.tsv (or .gz) does not exist; splits there: {', '.join(splits) or 'none'}; set split to one"
        )
    return found[0]


# ------------------------------------------------------------------------------------------ lines and fields


def _check_file(path: Path) -> None:
    if path.is_file():
        return
    near = sorted(p.name for p in path.parent.iterdir())[:10] if path.parent.is_dir() else []
    where = f"{path.parent} holds: {', '.join(near) or 'nothing'}" if path.parent.is_dir() else "nor does its folder"
    raise UserError(f"{path} does not exist; {where}")


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes with their newline); split on \\n only (U+2028 may stand inside a string)."""
    _check_file(path)
    line = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            # readline with a limit: a file without newlines, or a gzip bomb, must not fill the memory.
            while raw := file.readline(MAX_LINE + 1):
                line += 1
                if len(raw) > MAX_LINE:
                    raise DataError(path, line, f"the line is longer than {MAX_LINE} bytes: is a newline missing?")
                if line == 1 and raw.startswith(b"\xef\xbb\xbf"):
                    raw = raw[3:]  # byte order mark
                yield line, raw
    except EOFError:
        raise DataError(path, line + 1, "the gzip stream ends early: the file is truncated, copy it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(path, line + 1, f"not a whole gzip file: {error}; copy it again or rename it") from None
    except OSError as error:
        raise DataError(path, line + 1, f"cannot be read: {os.strerror(error.errno or 0)}") from None


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, JSON object) of every line."""
    for line, raw in _raw_lines(path):
        try:
            text = _decode(raw)
            if not text.strip():
                raise ValueError("blank line: remove it")
            row = _DECODER.decode(text)
            if not isinstance(row, dict):
                raise ValueError(f'the row must be an object like {{"...": ...}}, got {_type(row)}')
        except RecursionError:
            raise DataError(path, line, "JSON nested too deep") from None
        except ValueError as error:  # JSONDecodeError, numbers with too many digits, our own
            message = str(error)
            if isinstance(error, json.JSONDecodeError):
                message = f"not JSON: {error.msg} (character {error.pos + 1})"
            if not raw.endswith(b"\n"):
                message += " (the last line has no newline: is the file truncated?)"
            raise DataError(path, line, message) from None
        yield line, row


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1}; convert it") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {_short(next(key for key in keys if keys.count(key) > 1))}: keep one")
    return row


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _text(row: dict[str, Any], field: str) -> str:
    if field not in row:
        raise ValueError(f"field {field!r} is missing")
    return _check_text(row[field], field)


def _check_text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} must be a string, got {_type(value)}")
    if not value.strip():
        raise ValueError(f"field {field!r} is empty or only spaces: give it text or remove the row")
    _check_unicode(value, field)
    return value


def _check_unicode(value: str, field: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"field {field!r} has a lone surrogate at character {error.start + 1}: not Unicode text, remove it"
        ) from None


_BAD_ID = re.compile(r"^\s|\s$|[\t\r\n]")


def _id(value: Any, field: str) -> str:
    """Ids are strings; integers become strings once, here, so that 1 in a corpus meets 1 in a qrels file."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"{field} must be a string or an integer, got {_type(value)}")
    if not value or _BAD_ID.search(value):
        raise ValueError(f"{field} {_short(value)} is empty or has spaces around it or a tab or newline inside")
    _check_unicode(value, field)
    return value


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), f"a number ({type(value).__name__})")


def _short(value: Any) -> str:
    """repr for a message, never longer than a line."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
