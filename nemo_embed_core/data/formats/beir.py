"""A BEIR folder: corpus.jsonl, queries.jsonl {"_id", "title", "text"}, qrels/{split}.tsv, plain or .gz.

Read as published: null titles, qrels without a header, TREC's four columns and, with on_missing "allow",
judgements of texts that do not exist and empty texts. What is read in such a way is noted in Findings.
"""

from __future__ import annotations

import re
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.data.dataset import is_dataset
from nemo_embed_core.data.documents import Documents
from nemo_embed_core.data.formats.qrels import read_qrels
from nemo_embed_core.data.formats.row import Row
from nemo_embed_core.data.lines import (
    NOISE,
    Findings,
    check_id,
    check_unicode,
    is_noise,
    json_lines,
    short,
    type_name,
)
from nemo_embed_core.data.texts import Texts, TextsById
from nemo_embed_core.errors import UserError

NAME = "beir"
OnMissing = Literal["error", "allow"]
ALLOW = "or set on_missing to allow"


class Beir(NamedTuple):
    """One split of a BEIR folder. corpus: id -> `title + " " + text`; queries: those that it judges.

    What read_beir returns has its texts on disk (data/texts.py).
    """

    corpus: Mapping[str, str]
    queries: Mapping[str, str]
    qrels: dict[str, dict[str, int]]
    languages: Mapping[str, str] = {}  # query id -> lang, where queries.jsonl says so
    document_languages: Mapping[str, str] = {}  # document id -> lang, likewise


def beir_of(
    corpus: Mapping[str, str], rows: Iterable[Row], document_languages: Mapping[str, str] | None = None
) -> Beir:
    """Of rows whose documents are in `corpus`: the positives are what is relevant, as no negative of a row is
    known to be irrelevant. A corpus of which a line is bad is none."""
    queries, qrels, languages = TextsById({}, Texts()), dict[str, dict[str, int]](), dict[str, str]()
    for row in rows:
        queries.indices[row.id] = queries.texts.append(row.query)
        qrels[row.id] = dict.fromkeys(row.pos_ids, 1)
        if row.lang:
            languages[row.id] = row.lang
    return Beir(usable(corpus), queries, qrels, languages, document_languages or {})


def usable(corpus: Mapping[str, str]) -> Mapping[str, str]:
    """Without its documents where a line of it is bad, as then none is found by its id."""
    return {} if isinstance(corpus, Documents) and not corpus.is_closed else corpus


def told_by(path: Path) -> str:
    return next((name for name in MARKS if path.is_dir() and (path / name).exists()), "")


def files(config: DatasetConfig) -> list[Path]:
    """[corpus, queries, qrels of the split]; UserError with what the folder holds instead."""
    return _files(Path(config.path), config.split)


def tasks(config: DatasetConfig) -> tuple[str, str]:
    return "", ""


def reading(config: DatasetConfig) -> list[str]:
    """What decides the rows besides the files, for digests; stores from before negative judgements were read
    have no "irrelevant"."""
    qrels, _ = read_qrels(files(config)[2], Findings())
    has_irrelevant = any(score <= 0 for scores in qrels.values() for score in scores.values())
    allowed = [] if config.on_missing == "error" else [f"on_missing={config.on_missing}"]
    return [*allowed, *(["judged irrelevant: neg"] if has_irrelevant else [])]


class _Split(NamedTuple):
    """A split as it is in the files; its judgements may name texts that do not exist."""

    file: Path  # of the qrels
    qrels: dict[str, dict[str, int]]
    lines: dict[tuple[str, str], int]  # of the qrels file, of every pair
    queries: TextsById
    corpus: TextsById
    languages: dict[str, str]


class Corpus(NamedTuple):
    """Every text of it, for all splits. is_whole: no line is bad."""

    texts: TextsById
    languages: dict[str, str]
    is_whole: bool


def open_corpus(config: DatasetConfig, findings: Findings) -> Corpus:
    languages, before = dict[str, str](), findings.num_met
    file = files(config)[0]
    texts = _read_texts(file, lambda _: True, config.on_missing, findings, languages, "documents")
    return Corpus(texts, languages, findings.num_met == before)


def beir(config: DatasetConfig, corpus: Corpus, findings: Findings) -> Beir:
    """With on_missing "allow" empty texts are "" and judgements of documents that do not exist stay.

    So does mteb: such a document is never found, and counts in the ideal ranking. A judgement of a query that
    does not exist counts nowhere.
    """
    s = _read_split(config, findings, corpus)
    qrels = {qid: scores for qid, scores in s.qrels.items() if qid in s.queries}
    queries = TextsById({qid: s.queries.indices[qid] for qid in qrels}, s.queries.texts)
    return Beir(s.corpus, queries, qrels, s.languages, corpus.languages)


def rows(config: DatasetConfig, findings: Findings) -> Iterator[Row]:
    """One row per judged query in the order of the qrels, made when it is asked for: the texts stand on disk.

    pos: documents with a score above 0. neg: the others, which somebody judged not to answer the query.
    """
    before, num_rows = findings.num_met, 0
    s = _read_split(config, findings)
    if findings.num_met > before:
        return  # the rows that are left would be wrong: a text behind a bad line seems not to exist
    for qid, scores in s.qrels.items():
        line = s.lines[qid, next(iter(scores))]
        if qid not in s.queries:  # noted when the split was read
            continue
        if not (query := s.queries[qid]):
            findings.note("rows left out, as their query is empty", s.file, line)
            continue
        pos: dict[str, str] = {}  # id -> text
        neg: dict[str, str] = {}
        for doc, score in scores.items():
            if text := s.corpus.get(doc, ""):
                (pos if score > 0 else neg)[doc] = text
            elif doc in s.corpus:
                findings.note("judgements of empty documents, left out", s.file, s.lines[qid, doc])
        if not pos:
            if config.on_missing == "error":
                what = f"query {short(qid)} has no document with a score above 0"
                fix = f"remove its judgements from this training split, give it a positive {ALLOW}"
                findings.bad(s.file, line, f"{what}: {fix}, which leaves it out", row=True)
            else:
                what = "rows left out, as their query has no document with a score above 0"
                findings.note(what, s.file, line)
            continue
        relevant = set(pos.values())
        if both := [doc for doc, text in neg.items() if text in relevant]:
            what = "documents judged irrelevant with the text of a relevant one, left out"
            findings.note(what, s.file, line, len(both))
        neg = {doc: text for doc, text in neg.items() if text not in relevant}
        lang, num_rows = s.languages.get(qid, ""), num_rows + 1
        texts = (query, list(pos.values()), list(neg.values()))
        yield Row(*texts, str(s.file), line, lang, qid, pos_ids=list(pos), neg_ids=list(neg))
    if not num_rows and findings.num_met == before:
        what = "no judgement has a query, and a document with a score above 0, that exist"
        findings.bad(s.file, 1, f"no row is left: {what}")


def _read_split(config: DatasetConfig, findings: Findings, whole: Corpus | None = None) -> _Split:
    """whole: with the texts of documents that the split does not judge; without it those that it judges are
    read."""
    corpus_file, queries_file, file = files(config)
    before, on_missing = findings.num_met, config.on_missing
    qrels, lines = read_qrels(file, findings)
    judged = {doc for scores in qrels.values() for doc in scores}
    languages: dict[str, str] = {}
    queries = _read_texts(queries_file, qrels.__contains__, on_missing, findings, languages, "queries")
    if whole is None:
        corpus = _read_texts(corpus_file, judged.__contains__, on_missing, findings, None, "documents")
    else:
        corpus = whole.texts
    read = _Split(file, qrels, lines, queries, corpus, languages)
    # A text behind a bad line seems not to exist.
    if findings.num_met == before and (whole is None or whole.is_whole):
        happens = "kept, as nothing can find them" if whole else "left out"
        _check_dangling(read, on_missing, findings, happens)
    return read


def _check_dangling(s: _Split, on_missing: OnMissing, findings: Findings, what_happens: str) -> None:
    """Judgements whose query or document does not exist: the first one and the count of all, or notes."""
    bad = [pair for pair in s.lines if pair[0] not in s.queries or pair[1] not in s.corpus]
    if not bad:
        return
    quoted = [pair for pair in bad if _unquoted(pair[0]) in s.queries or _unquoted(pair[1]) in s.corpus]
    all_queries = len({qid for qid, _ in bad if qid not in s.queries}) == len(s.qrels)
    if on_missing == "error" or quoted or all_queries:
        qid, doc = (quoted or bad)[0]
        what = f"query {short(qid)} is not in queries.jsonl ({len(s.queries)} queries)"
        if qid in s.queries:
            what = f"document {short(doc)} is not in corpus.jsonl ({len(s.corpus)} documents)"
        fix = f"remove them, add the texts {ALLOW}"
        if quoted:
            fix = "it is there without the quotes: remove them from the qrels"
        elif all_queries:
            fix = "do queries and qrels belong together?"
        message = f"{what}; {len(bad)} of {len(s.lines)} judgements dangle: {fix}"
        findings.bad(s.file, s.lines[qid, doc], message)
        return
    for qid, doc in bad:
        what = f"judgements of documents that are not in corpus.jsonl, {what_happens}"
        if qid not in s.queries:
            what = "judgements of queries that are not in queries.jsonl, left out"
        findings.note(what, s.file, s.lines[qid, doc])


def _unquoted(key: str) -> str:
    """The id without quotes around it; "", which is no id, where there are none."""
    return key[1:-1] if len(key) > 2 and key[0] == key[-1] == '"' else ""


# -------------------------------------------------------------------------------------- corpus and queries


def _read_texts(
    path: Path,
    keep: Callable[[str], bool],
    on_missing: OnMissing,
    findings: Findings,
    languages: dict[str, str] | None,
    kind: str,
) -> TextsById:
    """{id: text} of a corpus or queries file in its order, every line checked; "" where keep(id) is False.

    languages: gets {id: lang} of the lines that say so.
    """
    texts = TextsById({}, Texts())
    nothing = texts.texts.append("")
    lines = array("q")  # of the texts, in order
    places: dict[str, int] = {}  # of the ids in `lines`, from the first that stands twice on
    for line, row in json_lines(path, findings, '{"_id": "...", "text": "..."}'):
        try:
            if "_id" not in row:
                raise ValueError("field '_id' is missing" + (": rename id to _id" if "id" in row else ""))
            key = check_id(row["_id"], "_id")
            if key in texts:
                places = places or {other: place for place, other in enumerate(texts)}
                first = lines[places[key]]
                raise ValueError(f"_id {short(key)} is already the _id of line {first}: make ids unique")
            if languages is not None and isinstance(lang := row.get("lang"), str) and keep(key):
                check_unicode(lang, "lang")
                languages[key] = sys.intern(lang)
            text = document_text(row, kind, on_missing, findings, path, line)
        except ValueError as error:
            findings.bad(path, line, str(error))
            continue
        if places:
            places[key] = len(lines)
        lines.append(line)
        texts.indices[key] = texts.texts.append(text) if text and keep(key) else nothing
    return texts


def document_text(
    row: dict[str, Any], kind: str, on_missing: OnMissing, findings: Findings, path: Path, line: int
) -> str:
    """`title + " " + text` where there is a title, as in BEIR's code; "" for an empty one that is allowed."""
    title, text = row.get("title", ""), row.get("text")
    if "text" not in row:
        raise ValueError("field 'text' is missing")
    if title is None:
        title = ""
        findings.note(f"{kind} with a null title, read as without", path, line)
    if not isinstance(title, str):
        raise ValueError(
            f"field 'title' must be a string, got {type_name(title)}: leave it out when there is none"
        )
    if not (text is None or isinstance(text, str)):
        raise ValueError(f"field 'text' must be a string, got {type_name(text)}")
    if text is None:
        if not title.strip() and on_missing == "error":
            raise ValueError(
                f"field 'text' must be a string, got null: give it text, remove the line {ALLOW}"
            )
        text = ""
        findings.note(f"{kind} with a null text, read as empty", path, line)
    if title.strip():
        text = f"{title} {text}" if text.strip() else title
    if not text.strip():
        if on_missing == "error":
            raise ValueError(f"field 'text' is empty or only spaces: give it text, remove the line {ALLOW}")
        findings.note(f"{kind} that are empty", path, line)
        return ""
    check_unicode(text, "text")
    if is_noise(text):
        findings.note(f"{kind} {NOISE}", path, line)
    return text


def pool_texts(path: Path, on_missing: OnMissing, findings: Findings) -> Iterator[tuple[str, str]]:
    """(id or "", text) of lines {"text", "title"?, "_id"?, ...}; empty ones are left out where allowed."""
    for line, row in json_lines(path, findings, '{"text": "..."}'):
        try:
            key = check_id(row["_id"], "_id") if "_id" in row else ""
            text = document_text(row, "documents", on_missing, findings, path, line)
        except ValueError as error:
            findings.bad(path, line, str(error))
            continue
        if text:
            yield key, text


# ------------------------------------------------------------------------------------------ files


MARKS = ("corpus.jsonl", "corpus.jsonl.gz", "queries.jsonl", "queries.jsonl.gz", "qrels")


def splits(folder: Path) -> list[str]:
    """That it has judgements of."""
    names = [file.name.removesuffix(".gz") for file in (folder / "qrels").glob("*.tsv*")]
    return sorted({name.removesuffix(".tsv") for name in names})


def _files(folder: Path, split: str) -> list[Path]:
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder: a BEIR folder holds corpus.jsonl, queries.jsonl and qrels/"
        )
    names = sorted(p.name for p in folder.iterdir())
    is_model = " but a model" if "config.json" in names else ""
    if not set(MARKS) & set(names):
        inside = [str(folder / name) for name in names if is_dataset(folder / name)]
        one_of = f"; its dataset folders are {', '.join(inside[:10])}: give one of them" if inside else ""
        raise UserError(
            f"{folder} is no BEIR folder (corpus.jsonl, queries.jsonl, qrels/){is_model}; it "
            f"holds: {', '.join(names[:10]) or 'nothing'}{one_of}"
        )
    texts = [_file(folder, name, names) for name in ("corpus.jsonl", "queries.jsonl")]
    return [*texts, _qrels_file(folder, split)]


def _file(folder: Path, name: str, names: list[str]) -> Path:
    """folder/name or folder/name.gz; both, or a table of that name beside it, or none is an error."""
    found = [file for file in (folder / name, folder / f"{name}.gz") if file.is_file()]
    table = folder / name.replace(".jsonl", ".parquet")
    both = [file.name for file in (*found, table) if file.is_file()]
    if found and len(both) > 1:
        raise UserError(f"{folder} has both {both[0]} and {both[1]}: remove one")
    if not found:
        is_parquet = any(other.endswith(".parquet") for other in names)
        fix = "; Parquet is not read: write it as JSONL" if is_parquet else ""
        raise UserError(
            f"{folder / name} (or .gz) does not exist; the folder holds: {', '.join(names[:10])}{fix}"
        )
    return found[0]


def _qrels_file(folder: Path, split: str) -> Path:
    if not re.fullmatch(r"\w[\w.-]*", split):
        raise UserError(f"split {split!r} is not a plain name like train or test")
    qrels = folder / "qrels"
    found = [file for file in (qrels / f"{split}.tsv", qrels / f"{split}.tsv.gz") if file.is_file()]
    if len(found) == 2:
        raise UserError(f"{qrels} has both {split}.tsv and {split}.tsv.gz: remove one")
    if not found:
        there = sorted(p.name for p in qrels.iterdir())[:10] if qrels.is_dir() else []
        known = splits(folder)[:10]
        says = f"splits there: {', '.join(known) or 'none'}; set split to one"
        if there and not known:
            says = f"{qrels} holds: {', '.join(there)}; judgements are read from {{split}}.tsv"
        raise UserError(f"{qrels / split}.tsv (or .gz) does not exist; {says}")
    return found[0]
