"""Training data tokenised once: flat files of token ids, memory-mapped, named by a digest of all that made them.

    store = open_store(config, tokenizer)      # builds cache_dir/<digest>/ when it is missing
    store.query_tokens(row), store.positives(row), store.negatives(row), store.document_tokens(doc_id)

A document id stands for one text (with its instruction): the same text is stored and encoded once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nemo_embed_core.config import DataConfig, DataError, UserError
from nemo_embed_core.data.prompts import query_prompt
from nemo_embed_core.data.readers import check_sources, read_rows, reading, source_files
from nemo_embed_core.data.tokenizer import Tokenizer

FORMAT_VERSION = 1  # changes when the same sources would give other files
BATCH = 2048  # texts per call of the tokenizer

TOKEN_FILES = ("query_tokens.bin", "document_tokens.bin")  # int32, little endian
ARRAY_FILES = (
    "query_offsets.npy",  # [rows + 1] int64 into query_tokens.bin
    "document_offsets.npy",  # [documents + 1] int64 into document_tokens.bin
    "positive_offsets.npy",  # [rows + 1] int64 into positives.npy
    "positives.npy",  # [...] int64 document ids
    "negative_offsets.npy",  # [rows + 1] int64 into negatives.npy
    "negatives.npy",  # [...] int64 document ids, none of them a positive of the same row
)


class Store:
    """A built store, opened read-only. Every length and count is checked on opening; verify() also reads the bytes."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        for name, entry in self.manifest["files"].items():
            size = (self.folder / name).stat().st_size if (self.folder / name).is_file() else None
            if size != entry["size"]:
                raise _damaged(self.folder, f"{name} has {size} bytes instead of {entry['size']}")
        self.digest: str = self.manifest["digest"]
        self.max_token_id: int = self.manifest["max_token_id"]  # the model's vocabulary must be larger
        try:
            self._query_tokens, self._document_tokens = (_map_tokens(self.folder / name) for name in TOKEN_FILES)
            arrays = {name: _map_array(self.folder / name) for name in ARRAY_FILES}
        except (OSError, ValueError) as error:
            raise _damaged(self.folder, str(error)) from None
        self.query_offsets, self.document_offsets = arrays["query_offsets.npy"], arrays["document_offsets.npy"]
        self.positive_offsets, self.positive_ids = arrays["positive_offsets.npy"], arrays["positives.npy"]
        self.negative_offsets, self.negative_ids = arrays["negative_offsets.npy"], arrays["negatives.npy"]
        rows, documents = self.manifest["rows"], self.manifest["documents"]
        for name, offsets, entries, values in (
            ("query_offsets.npy", self.query_offsets, rows, self._query_tokens),
            ("document_offsets.npy", self.document_offsets, documents, self._document_tokens),
            ("positive_offsets.npy", self.positive_offsets, rows, self.positive_ids),
            ("negative_offsets.npy", self.negative_offsets, rows, self.negative_ids),
        ):
            if offsets.shape != (entries + 1,) or offsets[0] != 0 or offsets[-1] != len(values):
                raise _damaged(self.folder, f"{name} does not fit {entries} entries of {len(values)} values")
        self.query_lengths = np.diff(self.query_offsets).astype(np.int32)
        self.document_lengths = np.diff(self.document_offsets).astype(np.int32)
        for name, lengths in (("query", self.query_lengths), ("document", self.document_lengths)):
            if len(lengths) == 0 or lengths.min() < 1:
                raise _damaged(self.folder, f"a {name} has no tokens")

    def __len__(self) -> int:
        return len(self.query_lengths)

    @property
    def num_documents(self) -> int:
        return len(self.document_lengths)

    def query_tokens(self, row: int) -> np.ndarray:
        return self._query_tokens[self.query_offsets[row] : self.query_offsets[row + 1]]

    def document_tokens(self, doc_id: int) -> np.ndarray:
        return self._document_tokens[self.document_offsets[doc_id] : self.document_offsets[doc_id + 1]]

    def positives(self, row: int) -> np.ndarray:
        return self.positive_ids[self.positive_offsets[row] : self.positive_offsets[row + 1]]

    def negatives(self, row: int) -> np.ndarray:
        return self.negative_ids[self.negative_offsets[row] : self.negative_offsets[row + 1]]

    def verify(self) -> None:
        """UserError naming the file when the content is not what was built: sha256 of every file, ids within range."""
        for name, entry in self.manifest["files"].items():
            if _sha256(self.folder / name) != entry["sha256"]:
                raise _damaged(self.folder, f"the sha256 of {name} differs from the manifest's")
        for tokens in (self._query_tokens, self._document_tokens):
            assert tokens.min() >= 0 and tokens.max() <= self.max_token_id
        for ids in (self.positive_ids, self.negative_ids):
            assert not len(ids) or (ids.min() >= 0 and ids.max() < self.num_documents)


def open_store(config: DataConfig, tokenizer: Tokenizer, log: Callable[[str], None] = print) -> Store:
    """The store of these datasets, tokenizer and lengths: opened when cache_dir has it, else built, verified, published.

    Several processes may call this at once: each builds its own copy and one rename wins, so to save work let one
    rank build first. Raises DataError for bad rows and UserError for a damaged store or a too short max_length.
    """
    if not config.datasets:
        raise UserError("data.datasets is empty: name at least one .jsonl file or BEIR folder")
    for dataset in config.datasets:
        tokenizer.check_prompt(query_prompt(dataset.task), config.query_max_length, "data.query_max_length")
        prompt = query_prompt(dataset.document_task)
        tokenizer.check_prompt(prompt, config.document_max_length, "data.document_max_length")
    stamps = _stamps(config)
    sources: list[dict[str, Any]] = []
    for dataset in config.datasets:
        files = {str(file): _sha256(file) for file in source_files(dataset)}
        source = {"task": dataset.task, "document_task": dataset.document_task, "reading": reading(dataset)}
        sources.append({**source, "files": files})
    made_of = {
        "version": FORMAT_VERSION,
        "tokenizer": tokenizer.digest,
        "query_max_length": config.query_max_length,
        "document_max_length": config.document_max_length,
        # The content of the files, not their names: a moved data set keeps its store.
        "sources": [
            [*source["files"].values(), source["task"], source["document_task"], *source["reading"]]
            for source in sources
        ],
    }
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    folder = Path(config.cache_dir) / digest[:32]
    if not folder.exists():
        for line in check_sources(config.datasets).lines():
            log(line)
        temporary = folder.with_name(f".building-{digest[:16]}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
        try:
            temporary.mkdir(parents=True)
            _build(temporary, config, tokenizer, {**made_of, "sources": sources, "digest": digest}, log)
            if _stamps(config) != stamps:
                raise UserError("a data file changed while it was being tokenised; start again when it is complete")
            Store(temporary).verify()
            _publish(temporary, folder)
        except OSError as error:
            raise UserError(f"the store cannot be written to {folder}: {error.strerror} (data.cache_dir)") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    store = Store(folder)
    if store.digest != digest:
        raise _damaged(folder, f"its manifest has digest {store.digest[:12]} instead of {digest[:12]}")
    log(report(store))
    return store


def report(store: Store) -> str:
    """What is in the store, for people: rows, documents, tokens, what was cut."""
    m = store.manifest
    lines = [
        f"store {store.folder}: {m['rows']:,} rows, {m['documents']:,} documents, "
        f"{m['query_tokens'] + m['document_tokens']:,} tokens "
        f"(mean {m['query_tokens'] / m['rows']:.1f} a query, {m['document_tokens'] / m['documents']:.1f} a document)",
        f"  truncated: {m['truncated_queries']:,} queries ({m['truncated_queries'] / m['rows']:.2%}) at "
        f"{m['query_max_length']} tokens, {m['truncated_documents']:,} documents "
        f"({m['truncated_documents'] / m['documents']:.2%}) at {m['document_max_length']}",
        f"  negatives: {m['negatives'] / m['rows']:.1f} a row, {m['rows_without_negatives']:,} rows without; "
        f"repeated texts within a row merged: {m['merged_repeats']:,}",
    ]
    if len(m["sources"]) > 1:
        lines += [f"  {source['rows']:,} rows from {', '.join(source['files'])}" for source in m["sources"]]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ building


class _TokenFile:
    """Texts in, int32 token ids appended to a file, BATCH texts tokenised at a time."""

    def __init__(self, path: Path, tokenizer: Tokenizer, max_length: int):
        self._file = open(path, "wb")  # noqa: SIM115  (closed in close)
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._pending: list[str] = []
        self._origins: list[tuple[str, int]] = []
        self.offsets = array("q", [0])
        self.truncated = 0
        self.max_token_id = 0

    def add(self, text: str, path: str, line: int) -> None:
        self._pending.append(text)
        self._origins.append((path, line))
        if len(self._pending) == BATCH:
            self._flush()

    def _flush(self) -> None:
        before = self._tokenizer.num_truncated
        try:
            arrays = self._tokenizer.encode(self._pending, self._max_length)
        except UserError:
            for text, (path, line) in zip(self._pending, self._origins, strict=True):
                try:
                    self._tokenizer.encode([text], self._max_length)
                except UserError as error:
                    raise DataError(path, line, str(error)) from None
            raise
        self.truncated += self._tokenizer.num_truncated - before
        end = self.offsets[-1]
        for ids in arrays:
            end += len(ids)
            self.offsets.append(end)
        tokens = np.concatenate(arrays)
        self.max_token_id = max(self.max_token_id, int(tokens.max()))
        self._file.write(tokens.astype("<i4").tobytes())
        self._pending.clear()
        self._origins.clear()

    def close(self) -> None:
        if self._pending:
            self._flush()
        self._file.close()


def _build(
    folder: Path, config: DataConfig, tokenizer: Tokenizer, header: dict[str, Any], log: Callable[[str], None]
) -> None:
    """Writes all files of the store into an empty folder, the manifest last."""
    queries = _TokenFile(folder / TOKEN_FILES[0], tokenizer, config.query_max_length)
    documents = _TokenFile(folder / TOKEN_FILES[1], tokenizer, config.document_max_length)
    ids: dict[bytes, int] = {}  # blake2b-128 of a document text -> its id
    positives, positive_offsets = array("q"), array("q", [0])
    negatives, negative_offsets = array("q"), array("q", [0])
    rows = merged = rows_without_negatives = 0

    def document_id(text: str, path: str, line: int) -> int:
        key = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
        doc_id = ids.get(key)
        if doc_id is None:
            doc_id = ids[key] = len(ids)
            documents.add(text, path, line)
        return doc_id

    for dataset, source in zip(config.datasets, header["sources"], strict=True):
        first = rows
        query_prefix, document_prefix = query_prompt(dataset.task), query_prompt(dataset.document_task)
        for row in read_rows(dataset):
            queries.add(query_prefix + row.query, row.path, row.line)
            pos = [document_id(document_prefix + text, row.path, row.line) for text in row.pos]
            neg = [document_id(document_prefix + text, row.path, row.line) for text in row.neg]
            # A text twice in one list would count twice in the softmax: once is enough, and it is reported.
            unique_pos, unique_neg = list(dict.fromkeys(pos)), list(dict.fromkeys(neg))
            assert not set(unique_pos).intersection(unique_neg), f"{row.path}:{row.line}: the reader refuses this"
            merged += len(pos) + len(neg) - len(unique_pos) - len(unique_neg)
            rows_without_negatives += not unique_neg
            positives.extend(unique_pos)
            negatives.extend(unique_neg)
            positive_offsets.append(len(positives))
            negative_offsets.append(len(negatives))
            rows += 1
            if rows % 1_000_000 == 0:
                log(f"tokenising: {rows:,} rows, {len(ids):,} documents")
        source["rows"] = rows - first
    queries.close()
    documents.close()

    arrays = (queries.offsets, documents.offsets, positive_offsets, positives, negative_offsets, negatives)
    for name, values in zip(ARRAY_FILES, arrays, strict=True):
        np.save(folder / name, np.frombuffer(values, dtype=np.int64) if len(values) else np.empty(0, np.int64))
    manifest = {
        **header,
        "rows": rows,
        "documents": len(ids),
        "query_tokens": queries.offsets[-1],
        "document_tokens": documents.offsets[-1],
        "positives": len(positives),
        "negatives": len(negatives),
        "rows_without_negatives": rows_without_negatives,
        "merged_repeats": merged,
        "truncated_queries": queries.truncated,
        "truncated_documents": documents.truncated,
        "max_token_id": max(queries.max_token_id, documents.max_token_id),
        "files": {
            name: {"size": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
            for name in (*TOKEN_FILES, *ARRAY_FILES)
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _publish(temporary: Path, folder: Path) -> None:
    """Renames a built store into place, durably; losing the race to another builder of the same digest is fine."""
    for file in temporary.iterdir():
        _fsync(file)
    _fsync(temporary)
    try:
        os.rename(temporary, folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        return
    _fsync(folder.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------ opening


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["version"] != FORMAT_VERSION:
            raise UserError(f"{folder} has store format {manifest['version']}, this code reads {FORMAT_VERSION}")
        counts = ("rows", "documents", "max_token_id")
        if not all(isinstance(manifest[key], int) for key in counts) or not isinstance(manifest["digest"], str):
            raise ValueError("wrong types in manifest.json")
        if set(manifest["files"]) != {*TOKEN_FILES, *ARRAY_FILES}:
            raise ValueError("manifest.json does not list the files of a store")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(folder, f"manifest.json: {error!r}") from None
    return manifest


def _damaged(folder: Path, what: str) -> UserError:
    return UserError(f"the token store {folder} is damaged: {what}; delete that folder and it is built again")


def _map_tokens(path: Path) -> np.ndarray:
    return np.asarray(np.memmap(path, dtype="<i4", mode="r"))


def _map_array(path: Path) -> np.ndarray:
    values = np.load(path, mmap_mode="r" if path.stat().st_size > 1024 else None, allow_pickle=False)
    if values.dtype != np.int64 or values.ndim != 1:
        raise ValueError(f"{path.name} is {values.dtype} {values.shape}, not a list of int64")
    return np.asarray(values)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamps(config: DataConfig) -> list[tuple[str, int, int]]:
    """(file, size, mtime) of all sources: what changes when somebody still writes to one."""
    files = [file for dataset in config.datasets for file in source_files(dataset)]
    return [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
