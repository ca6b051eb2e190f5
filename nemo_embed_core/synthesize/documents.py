"""A folder of documents: which of its files are read, and in which split each one is.

for document in read_documents("docs/", log): document.id, document.text, document.parsed
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_embed_core.data.normal_form import has_content, normal_key
from nemo_embed_core.errors import UserError
from nemo_embed_core.synthesize.structure import SUFFIXES, Parsed, parse

MAX_BYTES = 32 << 20  # of a file: beyond it is data, not a document


@dataclass(frozen=True)
class Document:
    id: str  # its path in the folder
    text: str
    parsed: Parsed


def read_documents(folder: str | Path, log: Callable[[str], None]) -> Iterator[Document]:
    """Files of SUFFIXES, also with .gz, below the folder, in the order of their paths; hidden ones are not.

    UTF-8, with or without a byte order mark. What is left out is counted and said with the first file of each
    reason: another suffix, another encoding, a copy of an earlier document (in the normal form), no content,
    over MAX_BYTES. UserError where nothing is left. Memory: one document, and 16 bytes for each.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"documents: {root} is no folder; give the folder that the documents are in")
    left_out, first, others = Counter[str](), dict[str, str](), Counter[str]()
    seen, count = set[bytes](), 0
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        suffix = (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()
        if suffix not in SUFFIXES:
            others[suffix or "none"] += 1
            continue
        try:
            document = _read(path, name.as_posix(), SUFFIXES[suffix], seen)
        except ValueError as error:
            left_out[str(error)] += 1
            first.setdefault(str(error), name.as_posix())
            continue
        count += 1
        yield document
    if others:
        most = ", ".join(f"{suffix} {number:,}" for suffix, number in others.most_common(8))
        log(
            f"{root}: {others.total():,} files left out: another suffix ({most}{', ...' * (len(others) > 8)})"
        )
    for reason, number in left_out.most_common():
        log(f"{root}: {number:,} files left out: {reason} (first: {first[reason]})")
    if not count:
        suffixes = ", ".join(SUFFIXES)
        raise UserError(f"documents: {root} holds no document that can be read: files of {suffixes}, or .gz")


def _read(path: Path, name: str, kind: str, seen: set[bytes]) -> Document:
    """ValueError with the reason why it is left out."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            data = file.read(MAX_BYTES + 1)
        except (OSError, EOFError, zlib.error):
            raise ValueError("damaged gzip") from None
    if len(data) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES >> 20} MiB")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    if "\0" in text:
        raise ValueError("binary")
    if not has_content(text):
        raise ValueError("no content")
    if (key := normal_key(text)) in seen:
        raise ValueError("a copy of an earlier document")
    seen.add(key)
    return Document(name, text, parse(kind, text))


def is_held_out(name: str, share: float, seed: int) -> bool:
    """By the document's path alone, whatever else is in the folder."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8]) < share * 2.0**64
