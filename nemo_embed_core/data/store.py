"""Training data tokenised once: files of token ids, memory-mapped, named by a digest of all that made them.

    store = open_store(config, tokenizer)      # builds cache_dir/<digest>/ when it is missing (data/build.py)
    store.query_tokens(row), store.positives(row), store.negatives(row), store.document_tokens(doc_id)

A document id stands for one text (with its instruction) and the length at which it is cut: the same text is
stored and encoded once, or once for each length where datasets have their own. Two documents are the same for
the loss when their texts have one normal form, or when they have the same tokens after truncation:
store.same_as.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nemo_embed_core.config.data import Lengths
from nemo_embed_core.data.vectors import KEYS
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.durable import sha256_file
from nemo_embed_core.files.strict_json import parse

FORMAT_VERSION = 2  # changes when the same sources would give other files

DROPPED = "dropped.txt"  # path:line: reason of every row that data.on_bad=drop left out, where there are some
TOKEN_FILES = ("query_tokens.bin", "document_tokens.bin")  # int32, little endian
ARRAY_FILES = (
    "query_offsets.npy",  # [rows + 1] int64 into query_tokens.bin
    "document_offsets.npy",  # [documents + 1] int64 into document_tokens.bin
    "positive_offsets.npy",  # [rows + 1] int64 into positives.npy
    "positives.npy",  # [...] int64 document ids
    "negative_offsets.npy",  # [rows + 1] int64 into negatives.npy
    "negatives.npy",  # [...] int64 document ids, none of them a known positive of the row
    "row_lines.npy",  # [rows] int64 line in the source
    "same_as.npy",  # [documents] int64 smallest id of the documents that are the same
    "row_groups.npy",  # [rows] int64, equal for rows with the same query
    "known_offsets.npy",  # [groups + 1] int64 into known.npy
    "known.npy",  # [...] int64 same_as of what is never a negative of the group, ascending
)
# [rows] int64, where rows have groups: equal for those of one, a number as in row_groups.npy, -1 for none.
CLASSES = "row_classes.npy"
# Where rows have a teacher's scores: fp32 beside positives.npy and negatives.npy, NaN where there is none.
SCORES = ("positive_scores.npy", "negative_scores.npy")
GRADES = "row_grades.npy"  # [rows] fp32, where datasets have grades; NaN for rows of others
# [rows], [documents] S16, which vectors are found by: exact_key of the text, without its dataset's
# instruction and with a row's own. Older stores have none.
TEXT_KEYS = ("query_text_keys.npy", "document_text_keys.npy")
OPTIONAL_FILES = {CLASSES, GRADES, *SCORES, *TEXT_KEYS}


class Store:
    """A built store, read-only. Lengths and counts are checked on opening; verify() also reads the bytes."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        for name, entry in self.manifest["files"].items():
            size = (self.folder / name).stat().st_size if (self.folder / name).is_file() else None
            if size != entry["size"]:
                raise damaged(self.folder, f"{name} has {size} bytes instead of {entry['size']}")
        self.digest: str = self.manifest["digest"]
        self.max_token_id: int = self.manifest["max_token_id"]  # the model's vocabulary must be larger
        try:
            self._query_tokens, self._document_tokens = (
                _map_tokens(self.folder / name) for name in TOKEN_FILES
            )
            arrays = {
                name: _map_array(self.folder / name)
                for name in self.manifest["files"]
                if name not in TOKEN_FILES
            }
        except (OSError, ValueError) as error:
            raise damaged(self.folder, str(error)) from None
        self.query_offsets = arrays["query_offsets.npy"]
        self.document_offsets = arrays["document_offsets.npy"]
        self.positive_offsets, self.positive_ids = arrays["positive_offsets.npy"], arrays["positives.npy"]
        self.negative_offsets, self.negative_ids = arrays["negative_offsets.npy"], arrays["negatives.npy"]
        self.row_lines, self.row_groups = arrays["row_lines.npy"], arrays["row_groups.npy"]
        self.row_classes = arrays.get(CLASSES)
        self.positive_scores, self.negative_scores = map(arrays.get, SCORES)
        self.row_grades = arrays.get(GRADES)
        self.query_text_keys, self.document_text_keys = map(arrays.get, TEXT_KEYS)
        self.same_as = arrays["same_as.npy"]
        self.known_offsets, self.known_ids = arrays["known_offsets.npy"], arrays["known.npy"]
        rows, documents, groups = (self.manifest[key] for key in ("rows", "documents", "groups"))
        for name, offsets, entries, values in (
            ("query_offsets.npy", self.query_offsets, rows, self._query_tokens),
            ("document_offsets.npy", self.document_offsets, documents, self._document_tokens),
            ("positive_offsets.npy", self.positive_offsets, rows, self.positive_ids),
            ("negative_offsets.npy", self.negative_offsets, rows, self.negative_ids),
            ("known_offsets.npy", self.known_offsets, groups, self.known_ids),
        ):
            if offsets.shape != (entries + 1,) or offsets[0] != 0 or offsets[-1] != len(values):
                raise damaged(self.folder, f"{name} does not fit {entries} entries of {len(values)} values")
        for name, values, count in (
            ("row_lines.npy", self.row_lines, rows),
            ("row_groups.npy", self.row_groups, rows),
            (CLASSES, self.row_groups if self.row_classes is None else self.row_classes, rows),
            (GRADES, self.row_groups if self.row_grades is None else self.row_grades, rows),
            ("same_as.npy", self.same_as, documents),
            *(
                (name, arrays.get(name, like), len(like))
                for name, like in zip(TEXT_KEYS, (self.row_lines, self.same_as), strict=True)
            ),
            *(
                (name, arrays.get(name, ids), len(ids))
                for name, ids in zip(SCORES, (self.positive_ids, self.negative_ids), strict=True)
            ),
        ):
            if len(values) != count:
                raise damaged(self.folder, f"{name} has {len(values)} entries instead of {count}")
        self.query_lengths = np.diff(self.query_offsets).astype(np.int32)
        self.document_lengths = np.diff(self.document_offsets).astype(np.int32)
        for name, lengths in (("query", self.query_lengths), ("document", self.document_lengths)):
            if len(lengths) == 0 or lengths.min() < 1:
                raise damaged(self.folder, f"a {name} has no tokens")
        self._parts = row_parts(self.manifest["sources"])
        self._part_ends = np.cumsum([count for _, count in self._parts])
        self.dataset_ends = np.cumsum([source["rows"] for source in self.manifest["sources"]])  # in its rows
        num_datasets = len(self.manifest["sources"])
        each = (self.manifest[f"{side}_max_length"] for side in Lengths._fields)
        sides = [n if isinstance(n, list) else [n] * num_datasets for n in each]
        self.max_lengths = [Lengths(*pair) for pair in zip(*sides, strict=True)]  # of each dataset

    def __len__(self) -> int:
        return len(self.query_lengths)

    @property
    def num_documents(self) -> int:
        return len(self.document_lengths)

    def query_tokens(self, row: int) -> np.ndarray:
        return self._query_tokens[self.query_offsets[row] : self.query_offsets[row + 1]]

    def document_tokens(self, doc_id: int) -> np.ndarray:
        """The first document_lengths[doc_id] tokens; where that is not all, the last are the special ones."""
        start = self.document_offsets[doc_id]
        tokens = self._document_tokens[start : start + self.document_lengths[doc_id]]
        end = self.manifest["end_tokens"]
        if end and len(tokens) < self.document_offsets[doc_id + 1] - start:
            tokens = tokens.copy()
            tokens[-len(end) :] = end
        return tokens

    def positives(self, row: int) -> np.ndarray:
        return self.positive_ids[self.positive_offsets[row] : self.positive_offsets[row + 1]]

    def negatives(self, row: int) -> np.ndarray:
        return self.negative_ids[self.negative_offsets[row] : self.negative_offsets[row + 1]]

    def scores(self, rows_B: np.ndarray, doc_ids_BM: np.ndarray) -> np.ndarray | None:
        """fp32 [B, M]: the teacher's, of a positive of each row and then of negatives of it (-1: none); NaN
        where it gave none. None: of no row."""
        if self.positive_scores is None or self.negative_scores is None:
            return None
        scores_BM = np.full(doc_ids_BM.shape, np.nan, np.float32)
        for columns, offsets, ids, scores in (
            (slice(0, 1), self.positive_offsets, self.positive_ids, self.positive_scores),
            (slice(1, None), self.negative_offsets, self.negative_ids, self.negative_scores),
        ):
            starts, counts = offsets[rows_B], offsets[rows_B + 1] - offsets[rows_B]
            row = np.repeat(np.arange(len(rows_B)), counts)
            at = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts) + starts[row]
            entry, column = np.nonzero(ids[at][:, None] == doc_ids_BM[row, columns])
            scores_BM[row[entry], column + (columns.start or 0)] = scores[at[entry]]
        return scores_BM

    def known_positives(self, row: int) -> np.ndarray:
        """same_as of every document that is no negative of the row, ascending: the positives of all rows with
        the same query (one instruction, one normal form), and documents that are the query itself; those of
        all rows of the same class."""
        groups = [self.row_groups[row], *([] if self.row_classes is None else [self.row_classes[row]])]
        known = [self.known_ids[self.known_offsets[g] : self.known_offsets[g + 1]] for g in groups if g >= 0]
        return np.unique(np.concatenate(known))

    def where(self, row: int) -> str:
        """path:line of the row."""
        part = int(np.searchsorted(self._part_ends, row, side="right"))
        return f"{self._parts[part][0]}:{self.row_lines[row]}"

    def verify(self) -> None:
        """UserError naming the file whose sha256 is not the one that was built; ids are within range."""
        for name, entry in self.manifest["files"].items():
            if sha256_file(self.folder / name) != entry["sha256"]:
                raise damaged(self.folder, f"the sha256 of {name} differs from the manifest's")
        for tokens in (self._query_tokens, self._document_tokens):
            assert tokens.min() >= 0 and tokens.max() <= self.max_token_id
        for ids in (self.positive_ids, self.negative_ids, self.same_as, self.known_ids):
            assert not len(ids) or (ids.min() >= 0 and ids.max() < self.num_documents)
        assert self.row_classes is None or self.row_classes.max() < self.manifest["groups"]
        assert self.row_groups.min() >= 0 and self.row_groups.max() < self.manifest["groups"]


NOISE_SHARE = 0.01  # from which on the report says WARNING


def report(store: Store) -> str:
    """What is in the store, for people: rows, documents, tokens, what was cut, what teaches nothing."""
    m = store.manifest
    rows, documents = m["rows"], m["documents"]
    lines = [
        f"store {store.folder}: {_counted(rows, 'row')}, {_counted(documents, 'document')}, "
        f"{m['query_tokens'] + m['document_tokens']:,} tokens (mean {m['query_tokens'] / rows:.1f} a query, "
        f"{m['document_tokens'] / documents:.1f} a document)",
        f"  truncated: {_cut(m, rows, documents, m['query_max_length'], m['document_max_length'])}",
        f"  negatives: {m['negatives'] / rows:.1f} a row, {_counted(m['rows_without_negatives'], 'row')} "
        f"without; repeated texts within a row merged: {m['merged_repeats']:,}",
    ]
    if scored := m.get("scored_rows"):
        lines.append(f"  scores of a teacher: {_counted(scored, 'row')}")
    if dropped := m.get("dropped"):
        share = dropped["count"] / (rows + dropped["count"])
        warning = "WARNING: " if share > NOISE_SHARE else ""
        lines.append(
            f"  {warning}bad lines left out: {dropped['count']:,} ({share:.2%}), listed in "
            f"{store.folder / DROPPED}: {dropped['first'][0]}"
        )
    for kind, entry in m["noise"].items():
        if entry["count"]:
            share = entry["count"] / entry["of"]
            first = ", ".join(entry["first"]) + (", ..." if entry["count"] > len(entry["first"]) else "")
            warning = "WARNING: " if share > NOISE_SHARE else ""
            lines.append(f"  {warning}{kind}: {entry['count']:,} of {entry['of']:,} ({share:.2%}): {first}")
    if len(m["sources"]) > 1:
        for source, lengths in zip(m["sources"], store.max_lengths, strict=True):
            line = f"  {_counted(source['rows'], 'row')} from {', '.join(source['files'])}"
            if "documents" in source:  # a store from before counted for all together
                line += f", {_counted(source['documents'], 'document')}; truncated: "
                line += _cut(source, source["rows"], source["documents"], *lengths)
            lines.append(line)
    return "\n".join(lines)


def _cut(
    counts: dict[str, Any], rows: int, documents: int, query_at: int | list[int], document_at: int | list[int]
) -> str:
    """`2 queries (3.33%) at 48 tokens, 1 document (0.40%) at 24 to 512`."""
    queries, cut = counts["truncated_queries"], counts["truncated_documents"]
    at = [limits(n) for n in (query_at, document_at)]
    return (
        f"{_counted(queries, 'query', 'queries')} ({queries / max(1, rows):.2%}) at {at[0]} tokens, "
        f"{_counted(cut, 'document')} ({cut / max(1, documents):.2%}) at {at[1]}"
    )


def limits(at: int | list[int]) -> str:
    """`48`, or of datasets with their own `24 to 512`."""
    return f"{min(at)} to {max(at)}" if isinstance(at, list) else str(at)


def _counted(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


# ------------------------------------------------------------------------------------------ files


def row_parts(sources: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """(file, rows of it) in the order of the rows; of a source with one file that has rows, that one."""
    return [
        (str(file), int(rows))
        for source in sources
        for file, rows in source.get("parts") or [[source["row_file"], source["rows"]]]
    ]


def read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = parse((folder / "manifest.json").read_bytes())
        if manifest["version"] != FORMAT_VERSION:
            raise UserError(
                f"{folder} has store format {manifest['version']}, this code reads {FORMAT_VERSION}"
            )
        counts = ("rows", "documents", "groups", "max_token_id")
        is_counted = all(isinstance(manifest[key], int) for key in counts)
        if not is_counted or not isinstance(manifest["digest"], str):
            raise ValueError("wrong types in manifest.json")
        found = set(manifest["files"])
        if found - OPTIONAL_FILES != {*TOKEN_FILES, *ARRAY_FILES} or len(found & {*SCORES}) == 1:
            raise ValueError("manifest.json does not list the files of a store")
        if sum(source["rows"] for source in manifest["sources"]) != manifest["rows"]:
            raise ValueError("the rows of the sources in manifest.json do not sum to its rows")
        for side in Lengths._fields:
            each = manifest[f"{side}_max_length"]
            if isinstance(each, list) and len(each) != len(manifest["sources"]):
                raise ValueError(f"manifest.json has {len(each)} {side}_max_length for its sources")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(folder, f"manifest.json: {error!r}") from None
    return manifest


def damaged(folder: Path, what: str) -> UserError:
    return UserError(f"the token store {folder} is damaged: {what}; delete that folder and it is built again")


def _map_tokens(path: Path) -> np.ndarray:
    return np.asarray(np.memmap(path, dtype="<i4", mode="r"))


_DTYPES: dict[str, Any] = dict.fromkeys((*SCORES, GRADES), np.float32) | dict.fromkeys(TEXT_KEYS, KEYS)


def _map_array(path: Path) -> np.ndarray:
    dtype = np.dtype(_DTYPES.get(path.name, np.int64))
    values = np.load(path, mmap_mode="r" if path.stat().st_size > 1024 else None, allow_pickle=False)
    if values.dtype != dtype or values.ndim != 1:
        raise ValueError(f"{path.name} is {values.dtype} {values.shape}, not a list of {dtype}")
    values = np.asarray(values)
    values.flags.writeable = False
    return values
