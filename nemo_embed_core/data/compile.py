"""Rows into the files of a token store: all checked, then tokenised with progress, then judged as a whole.

What stands in the folder at the last commit survives a kill: the next build of the same store goes on from it
and ends with the same bytes.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from nemo_embed_core.config import DataConfig, DatasetConfig
from nemo_embed_core.data.building import Log, read_state
from nemo_embed_core.data.judge import EMPTY_KEY, NO_CLASS, OF_CLASS, judge
from nemo_embed_core.data.lines import MAX_NAMED
from nemo_embed_core.data.normal_form import bytes_key, exact_key, has_content, normal_key
from nemo_embed_core.data.prompts import query_prompt
from nemo_embed_core.data.readers import Findings, Row, check_sources, checked_rows
from nemo_embed_core.data.store import DROPPED, TEXT_KEYS, TOKEN_FILES, row_parts
from nemo_embed_core.data.tokenizer import Tokenizer
from nemo_embed_core.data.vectors import KEYS
from nemo_embed_core.errors import DataError, UserError, failpoint
from nemo_embed_core.files.durable import fsync, sha256_file, write_atomically

COMMIT_S = 10.0  # seconds between two lines of progress, each a state that a kill leaves whole
PENDING = 2 << 20  # characters that wait for the tokenizer

# Files that only a build has: raw int64, fp32 (*_scores, row_grades), 16 bytes a text, or one byte (*_cut:
# whether it lost tokens).
# judge() makes the arrays of the store of them.
PARTS = (
    "query_lengths", "query_hashes", "query_cut", "query_keys", "group_keys", "class_keys", "row_lines",
    "num_positives", "positives", "positive_scores", "num_negatives", "negatives", "negative_scores",
    "document_lengths", "document_hashes", "document_cut", "document_keys", "document_texts",
    "document_rows", "row_grades", "query_text_keys", "document_text_keys",
)  # fmt: skip


class _Files:
    """The files of a build, appended to; sizes at the last commit are those that a kill leaves."""

    def __init__(self, folder: Path, sizes: dict[str, int]):
        self._folder = folder
        self._files = {}
        for name in (*TOKEN_FILES, *(f"{part}.part" for part in PARTS)):
            file = open(folder / name, "ab")  # noqa: SIM115  (closed in close)
            file.truncate(sizes.get(name, 0))
            self._files[name] = file

    def add(self, part: str, data: bytes) -> None:
        self._files[f"{part}.part"].write(data)

    def add_tokens(self, name: str, tokens: np.ndarray) -> None:
        self._files[name].write(tokens.astype("<i4").tobytes())

    def commit(self, state: dict[str, Any]) -> None:
        sizes = {}
        for name, file in self._files.items():
            file.flush()
            fsync(file.fileno())
            sizes[name] = os.fstat(file.fileno()).st_size
        write_atomically(self._folder / "state.json", json.dumps({**state, "sizes": sizes}).encode())

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class _Texts:
    """Texts of one side on their way into the token file: beside it lengths, a hash of the tokens, and which
    texts were cut.

    One thread of `pool` tokenises, on all cores, while further rows are read: the library lets Python go on.
    """

    def __init__(
        self, files: _Files, side: str, tokenizer: Tokenizer, pool: ThreadPoolExecutor, state: dict[str, Any]
    ):
        self._files, self._side, self._tokenizer, self._pool = files, side, tokenizer, pool
        self._max_length = 0
        self._pending: list[str] = []
        self._origins: list[tuple[str, int]] = []
        self._size = 0
        self._encoding: tuple[Future[Any], int, list[str], list[tuple[str, int]]] | None = None
        self.max_token_id: int = state.get("max_token_id", 0)

    def cut_at(self, max_length: int) -> None:
        """The texts that are added from now on."""
        if max_length != self._max_length:
            self._submit()
            self._max_length = max_length

    def add(self, text: str, path: str, line: int) -> None:
        self._pending.append(text)
        self._origins.append((path, line))
        self._size += len(text)
        if self._size > PENDING:
            self._submit()

    def flush(self) -> None:
        self._submit()
        self._write()

    def _submit(self) -> None:
        self._write()
        if self._pending:
            job = self._pool.submit(self._tokenizer.encode_cut, self._pending, self._max_length)
            self._encoding = job, self._max_length, self._pending, self._origins
        self._pending, self._origins, self._size = [], [], 0

    def _write(self) -> None:
        if self._encoding is None:
            return
        (job, max_length, texts, origins), self._encoding = self._encoding, None
        try:
            arrays, is_cut = job.result()
        except UserError:
            for text, (path, line) in zip(texts, origins, strict=True):
                try:
                    self._tokenizer.encode_cut([text], max_length)
                except UserError as error:
                    raise DataError(path, line, str(error)) from None
            raise
        tokens = np.concatenate(arrays)
        self.max_token_id = max(self.max_token_id, int(tokens.max()))
        self._files.add_tokens(f"{self._side}_tokens.bin", tokens)
        self._files.add(f"{self._side}_lengths", array("q", map(len, arrays)).tobytes())
        self._files.add(f"{self._side}_hashes", b"".join(bytes_key(ids.tobytes()) for ids in arrays))
        self._files.add(f"{self._side}_cut", is_cut.tobytes())


def check_rows(config: DataConfig, tokenizer: Tokenizer | None, log: Log) -> Findings:
    """Reads and checks every row, tokenises none; what is found is logged. See check_sources."""
    findings = check_sources(config.datasets, log, config.on_bad == "drop", _check_of(config, tokenizer))
    for line in findings.lines():
        log(line)
    if count := len(findings.dropped):
        log(f"WARNING: {count:,} bad lines are left out, as data.on_bad=drop says:")
        for line in [*findings.dropped[:MAX_NAMED], *(["..."] if count > MAX_NAMED else [])]:
            log(f"  {line}")
    return findings


def rows_of(
    config: DataConfig, dataset: DatasetConfig, tokenizer: Tokenizer | None, findings: Findings | None = None
) -> Iterator[Row]:
    """Of one of the datasets, as they are tokenised: without what on_bad=drop leaves out, which is then in
    `findings`."""
    if findings is None:
        findings = Findings(strict=True, drop=config.on_bad == "drop")
    return checked_rows(dataset, findings, _check_of(config, tokenizer))


def _check_of(config: DataConfig, tokenizer: Tokenizer | None) -> Callable[[DatasetConfig, Row], None]:
    """check(dataset, row) is a ValueError where the row's own instruction leaves no room for its query."""

    def check(dataset: DatasetConfig, row: Row) -> None:
        if row.prompt is not None and tokenizer is not None:
            check_task(config, dataset, "query", row.prompt, tokenizer)

    return check


def compile_store(
    folder: Path, config: DataConfig, tokenizer: Tokenizer, header: dict[str, Any], log: Log
) -> None:
    """Writes all files of the store into the folder, the manifest last, going on from what stands there."""
    if (folder / "state.json").exists() or not (folder / "manifest.json").exists():
        _compile(folder, config, tokenizer, header, log)
    for name in ("state.json", *(f"{part}.part" for part in PARTS)):
        (folder / name).unlink(missing_ok=True)
        failpoint("store.unlink", name)


def _compile(
    folder: Path, config: DataConfig, tokenizer: Tokenizer, header: dict[str, Any], log: Log
) -> None:
    state = read_state(folder) or {}
    if state and "query_text_keys.part" not in state["sizes"]:
        state = {}  # begun by a version that did not keep all of these
    if state:
        done = f"{state['rows']:,} of {state['total']:,} rows"
        log(f"going on with {folder}: {done} were done when its process ended")
    else:
        findings = check_rows(config, tokenizer, log)
        no_rows = [0] * len(config.datasets)
        parts: list[list[Any]] = [[] for _ in config.datasets]
        state = {"rows": 0, "total": findings.num_rows, "source_rows": no_rows, "parts": parts, "merged": 0}
        if count := len(findings.dropped):
            write_atomically(folder / DROPPED, (f"{line}\n".encode() for line in findings.dropped))
            state["dropped"] = {"count": count, "first": findings.dropped[:3]}
    check_dropped(state, config)
    files = _Files(folder, state.get("sizes", {}))
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="tokenise") as pool:
            _tokenise(folder, files, config, tokenizer, pool, state, log)
    finally:
        files.close()
    for i, (source, rows) in enumerate(zip(header["sources"], state["source_rows"], strict=True)):
        source["rows"] = rows
        parts = state["parts"][i]
        if parts != [[source["row_file"], rows]] and sum(count for _, count in parts) == rows:
            source["parts"] = parts
    cut = _count_cut(folder, header["sources"])
    arrays, noise = judge(folder, row_parts(header["sources"]))
    arrays |= {name: np.fromfile(folder / f"{Path(name).stem}.part", KEYS) for name in TEXT_KEYS}
    for name, values in arrays.items():
        np.save(folder / name, values)
    left_out = int(noise.pop("left out")["count"])
    if left_out:
        header.pop("digest_v1", None)
    if noise.get(OF_CLASS, {"count": 0})["count"]:
        header.pop("digest_ungrouped", None)
    manifest = {
        **header,
        "rows": state["rows"],
        "documents": len(arrays["same_as.npy"]),
        "groups": len(arrays["known_offsets.npy"]) - 1,
        "query_tokens": int(arrays["query_offsets.npy"][-1]),
        "document_tokens": int(arrays["document_offsets.npy"][-1]),
        "positives": len(arrays["positives.npy"]),
        "negatives": len(arrays["negatives.npy"]),
        "rows_without_negatives": int((np.diff(arrays["negative_offsets.npy"]) == 0).sum()),
        "negatives_left_out": left_out,
        "merged_repeats": state["merged"],
        "scored_rows": state.get("scored", 0),
        **({"dropped": state["dropped"]} if "dropped" in state else {}),
        **cut,
        "max_token_id": state["max_token_id"],
        "noise": noise,
        "files": {
            name: {"size": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
            for name in (*TOKEN_FILES, *arrays)
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _count_cut(folder: Path, sources: list[dict[str, Any]]) -> dict[str, int]:
    """How many queries and documents lost tokens; likewise, and how many documents they are, of the rows of
    each source: one that several bring is counted for each."""
    cut_R, cut_D = (np.fromfile(folder / f"{side}_cut.part", bool) for side in ("query", "document"))
    ids, ends = {}, {}
    for part in ("positives", "negatives"):
        ids[part] = np.fromfile(folder / f"{part}.part", "<i8")
        ends[part] = np.concatenate([[0], np.cumsum(np.fromfile(folder / f"num_{part}.part", "<i8"))])
    first = 0
    for source in sources:
        end = first + source["rows"]
        own = np.unique(np.concatenate([ids[part][ends[part][first] : ends[part][end]] for part in ids]))
        source["documents"] = len(own)
        source["truncated_queries"] = int(cut_R[first:end].sum())
        source["truncated_documents"] = int(cut_D[own].sum())
        first = end
    return {"truncated_queries": int(cut_R.sum()), "truncated_documents": int(cut_D.sum())}


def _tokenise(
    folder: Path,
    files: _Files,
    config: DataConfig,
    tokenizer: Tokenizer,
    pool: ThreadPoolExecutor,
    state: dict[str, Any],
    log: Log,
) -> None:
    """Reads the rows that `state` does not have yet; brings state and files up to date."""

    queries, documents = (_Texts(files, side, tokenizer, pool, state) for side in ("query", "document"))
    known = (folder / "document_texts.part").read_bytes()
    # Key of a document with its prompt, and of where it is cut -> its id.
    ids = {known[at : at + 16]: at // 16 for at in range(0, len(known), 16)}
    rows, source_rows = state["rows"], list(state["source_rows"])
    # [file, rows of it]; a build that an older version began has none, of sources with one file.
    parts: list[list[list[Any]]] = state.get("parts") or [[] for _ in config.datasets]
    begun, first_row = time.monotonic(), rows
    last = begun

    def document_id(prompt: str, text: str, path: str, line: int) -> int:
        key = exact_key(f"{max_length} {prompt}{text}")
        doc_id = ids.get(key)
        if doc_id is None:
            doc_id = ids[key] = len(ids)
            documents.add(prompt + text, path, line)
            files.add("document_texts", key)
            files.add("document_text_keys", exact_key(text))
            files.add("document_keys", normal_key(text) if has_content(text) else EMPTY_KEY)
            files.add("document_rows", _int(rows))
        return doc_id

    def commit() -> None:
        queries.flush()
        documents.flush()
        max_token_id = max(queries.max_token_id, documents.max_token_id)
        state.update(rows=rows, source_rows=source_rows, parts=parts, max_token_id=max_token_id)
        files.commit(state)

    for i, dataset in enumerate(config.datasets):
        document_prefix = query_prompt(dataset.document_task)
        query_max_length, max_length = config.lengths(dataset)
        queries.cut_at(query_max_length)
        documents.cut_at(max_length)
        for row in itertools.islice(rows_of(config, dataset, tokenizer), source_rows[i], None):
            failpoint("store.row", rows)
            query_prefix = query_prompt(dataset.task if row.prompt is None else row.prompt)
            queries.add(query_prefix + row.query, row.path, row.line)
            pos = [document_id(document_prefix, text, row.path, row.line) for text in row.pos]
            neg = [document_id(document_prefix, text, row.path, row.line) for text in row.neg]
            # A text twice in one list would count twice in the softmax: once is enough, and it is reported.
            unique_pos, unique_neg = _first(pos, row.pos_scores), _first(neg, row.neg_scores)
            state["merged"] += len(pos) + len(neg) - len(unique_pos) - len(unique_neg)
            state["scored"] = state.get("scored", 0) + bool(row.pos_scores and row.neg_scores)
            files.add("query_text_keys", exact_key(query_prompt(row.prompt or "") + row.query))
            key = normal_key(row.query) if has_content(row.query) else EMPTY_KEY
            files.add("query_keys", key)
            files.add("group_keys", bytes_key(query_prefix.encode("utf-8") + b"\0" + key))
            files.add("class_keys", bytes_key(f"{i} {row.group}".encode()) if row.group else NO_CLASS)
            files.add("row_lines", _int(row.line))
            grade = row.grade if dataset.grades and row.grade is not None else math.nan
            files.add("row_grades", array("f", [grade]).tobytes())
            for part, side, values in (
                ("positives", "positive", unique_pos),
                ("negatives", "negative", unique_neg),
            ):
                files.add(f"num_{part}", _int(len(values)))
                files.add(part, array("q", values).tobytes())
                files.add(f"{side}_scores", array("f", values.values()).tobytes())
            if not parts[i] or parts[i][-1][0] != row.path:
                parts[i].append([row.path, 0])
            parts[i][-1][1] += 1
            rows, source_rows[i] = rows + 1, source_rows[i] + 1
            now = time.monotonic()
            if now - last >= COMMIT_S:
                commit()
                left = (state["total"] - rows) * (now - begun) / (rows - first_row)
                share = rows / max(1, state["total"])
                done = f"tokenised {rows:,} of {state['total']:,} rows ({share:.1%}), {len(ids):,} documents"
                log(f"{done}; about {_duration(left)} left")
                last = time.monotonic()
    commit()


def check_task(
    config: DataConfig, dataset: DatasetConfig, side: str, task: str, tokenizer: Tokenizer
) -> None:
    """UserError where the instruction leaves no room for the texts of this side."""
    name = f"{side}_max_length"
    is_own = getattr(dataset, name) is not None
    where = f"data.datasets[{dataset.name or Path(dataset.path).name}]." if is_own else "data."
    tokenizer.check_prompt(query_prompt(task), getattr(config.lengths(dataset), side), where + name)


def check_dropped(state: dict[str, Any], config: DataConfig) -> None:
    """state: of a build, or a store's manifest. UserError where rows are left out and this run says error."""
    if (dropped := state.get("dropped")) and config.on_bad == "error":
        raise UserError(
            f"the store of these datasets was built with data.on_bad=drop: {dropped['count']:,} bad lines "
            f"are left out, the first {dropped['first'][0]}; set data.on_bad to drop, or repair the data"
        )


def _first(ids: list[int], scores: Sequence[float]) -> dict[int, float]:
    """{id: score} of each document's first place in the list; NaN without scores."""
    found: dict[int, float] = {}
    for doc_id, score in zip(ids, scores or [math.nan] * len(ids), strict=True):
        found.setdefault(doc_id, score)
    return found


def _int(value: int) -> bytes:
    return value.to_bytes(8, "little", signed=True)


def _duration(seconds: float) -> str:
    if seconds > 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"
