"""NeMo Automodel with ids: a JSON file {"corpus": [{"path"}], "data": [{"question_id", "question",
"corpus_id", "pos_doc", "neg_doc"}]}, documents as {"id"} or bare ids. A corpus folder, whose path is relative
to the file, has merlin_metadata.json and rows {id, text}. Of several corpora the documents are
"corpus_id/id", and a row's instruction is its corpus's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.data.containers import json_items
from nemo_embed_core.data.dataset import Metadata, document_text, read_metadata
from nemo_embed_core.data.documents import Documents
from nemo_embed_core.data.formats.beir import Beir
from nemo_embed_core.data.formats.dataset import joined
from nemo_embed_core.data.formats.ids import beir_of_ids, entries, read_corpus, without
from nemo_embed_core.data.formats.row import Row, check_known
from nemo_embed_core.data.formats.writing import RowIds, document_id, write_parquet
from nemo_embed_core.data.lines import Findings, check_id, check_text, short, type_name
from nemo_embed_core.data.prompts import task_of
from nemo_embed_core.data.records import Source, find, records
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.durable import write_atomically

NAME = "automodel-ids"
SUFFIX = ".json"
METADATA = "merlin_metadata.json"
EXAMPLE = '{"question_id": "1", "question": "...", "corpus_id": "c", "pos_doc": [{"id": "7"}], "neg_doc": []}'
FIELDS = ("question_id", "question", "corpus_id", "pos_doc", "neg_doc")


def told_by(path: Path) -> str:
    if path.suffix != ".json" or not path.is_file():
        return ""
    with open(path, "rb") as file:
        return '"corpus"' if re.match(rb'\s*\{\s*"corpus"\s*:', file.read(1024)) else ""


def _corpora(path: Path) -> dict[str, tuple[Metadata, Source, Path]]:
    """By corpus_id: its metadata, files and folder; UserError where one is missing."""
    listed: Any = None
    for _, name, value in json_items(path, Findings(strict=True)):
        if name == "corpus":
            listed = value
            break
    entries = listed if isinstance(listed, list) else [listed]
    found: dict[str, tuple[Metadata, Source, Path]] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise UserError(f'{path}: "corpus" must be a list of {{"path": folder}}, got {short(listed)}')
        folder = path.parent / entry["path"]
        metadata = read_metadata(folder, name=METADATA)
        if metadata.corpus_id in found:
            raise UserError(f"{path}: two of its corpora have the corpus_id {short(metadata.corpus_id)}")
        found[metadata.corpus_id] = metadata, find(str(folder)), folder
    return found


def files(config: DatasetConfig) -> list[Path]:
    path = Path(config.path)
    of_corpora = [
        file for _, source, folder in _corpora(path).values() for file in (folder / METADATA, *source.files)
    ]
    return [*of_corpora, path]


def tasks(config: DatasetConfig) -> tuple[str, str]:
    """Of one corpus, or of several with the same instruction of queries; else each row has its corpus's."""
    found = [metadata for metadata, _, _ in _corpora(Path(config.path)).values()]
    prefixes = {side: {metadata.prefix(side) for metadata in found} for side in ("query", "passage")}
    if len(prefixes["passage"]) > 1:
        raise UserError(
            f"{config.path}: its corpora have several instructions of documents; give one file for each"
        )
    query = prefixes["query"]
    return task_of(query.pop()) if len(query) == 1 else "", task_of(prefixes["passage"].pop())


def open_corpus(config: DatasetConfig, findings: Findings) -> Documents:
    """Of all corpora; of several an id is `corpus_id/id`. Not closed where a row is bad."""
    corpora, before, documents = _corpora(Path(config.path)), findings.num_met, Documents()
    for corpus_id, (_, source, _) in corpora.items():
        prefix = f"{corpus_id}/" if len(corpora) > 1 else ""

        def id_and_text(fields: dict[str, Any], prefix: str = prefix) -> tuple[str, str]:
            check_known(fields, ("id", "text", "title"), required=("id", "text"))
            return prefix + check_id(fields["id"], "id"), document_text(fields)

        corpus = records(source, findings, '{"id": "...", "text": "..."}')
        read_corpus(corpus, id_and_text, config.ignore, findings, documents)
    return documents.close(findings) if findings.num_met == before else documents


def rows(config: DatasetConfig, findings: Findings) -> Iterator[Row]:
    yield from _rows(config, open_corpus(config, findings), findings)


def _rows(config: DatasetConfig, documents: Documents, findings: Findings) -> Iterator[Row]:
    if not documents.is_closed:
        return  # a document behind a bad row of a corpus seems not to exist
    path, seen = Path(config.path), dict[str, int]()
    corpora = {corpus_id: metadata for corpus_id, (metadata, _, _) in _corpora(path).items()}
    tasks = {corpus_id: task_of(metadata.prefix("query")) for corpus_id, metadata in corpora.items()}
    has_own = not config.task and len(set(tasks.values())) > 1
    for line, name, fields in json_items(path, findings):
        if name == "corpus":
            continue
        try:
            if name != "data" or not isinstance(fields, dict):
                raise ValueError(f"{short(name)} must be rows like {EXAMPLE}, got {type_name(fields)}")
            fields = without(fields, config.ignore)
            check_known(fields, FIELDS, required=FIELDS, example=EXAMPLE)
            key = check_id(fields["question_id"], "question_id")
            if key in seen:
                raise ValueError(f"question_id {short(key)} is already on line {seen[key]}: make ids unique")
            seen[key] = line
            corpus_id = check_id(fields["corpus_id"], "corpus_id")
            if corpus_id not in corpora:
                raise ValueError(f"corpus_id {short(corpus_id)} is none of {short(list(corpora))}")
            query = check_text(fields["question"], "question")
            prefix = f"{corpus_id}/" if len(corpora) > 1 else ""
            found = {side: entries(fields[side], side, prefix) for side in ("pos_doc", "neg_doc")}
            row = joined(found, key, query, documents, str(path), line, findings)
        except ValueError as error:
            findings.bad(path, line, str(error), row=True)
            continue
        yield row._replace(prompt=tasks[corpus_id]) if has_own else row
    if not seen and not findings.num_met:
        findings.bad(path, 1, "there are no rows")


def beir(config: DatasetConfig, corpus: Documents, findings: Findings) -> Beir:
    """Several corpora are searched as one."""
    return beir_of_ids(config, findings, corpus, _rows)


def write(path: Path, rows: Iterable[dict[str, Any]], num_negatives: int, digest: str) -> None:
    corpus = path.with_name(path.stem + "_corpus")
    corpus.mkdir(parents=True, exist_ok=True)
    # The peer refuses two folders under one corpus_id, and files of one name in several folders are common.
    corpus_id = f"{path.stem}-{digest[:8]}"
    seen: set[bytes] = set()
    new: list[dict[str, str]] = []

    def documents(row: dict[str, Any], kind: str) -> list[dict[str, Any]]:
        out: dict[str, dict[str, Any]] = {}
        for text, score in zip(row[kind], row[f"{kind}_scores"], strict=True):
            if (key := document_id(text)) in out:
                continue  # a row names a document once
            if (raw := bytes.fromhex(key)) not in seen:
                seen.add(raw)
                new.append({"id": key, "text": text})
            out[key] = {"id": key, "score": score}
        return [*out.values()]

    data, names = path.with_name(f".{path.name}.data.tmp"), RowIds()

    def texts() -> Iterable[dict[str, str]]:
        # One pass over the rows: ids go to a file of their own while their new texts go to the corpus.
        with open(data, "w", encoding="utf-8") as file:
            for i, row in enumerate(rows):
                question = {"question_id": names.of(i, row.get("id", "")), "question": row["query"]}
                lists = {"pos_doc": documents(row, "pos"), "neg_doc": documents(row, "neg")}
                line = {**question, "corpus_id": corpus_id, **lists}
                file.write((",\n" if i else "") + json.dumps(line, ensure_ascii=False))
                yield from new
                new.clear()

    def whole() -> Iterable[bytes]:
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
        write_parquet(corpus / "train.parquet", texts())
        described = json.dumps(metadata, indent=1, ensure_ascii=False)
        write_atomically(corpus / METADATA, described.encode())
        write_atomically(path, whole())
    finally:
        data.unlink(missing_ok=True)
