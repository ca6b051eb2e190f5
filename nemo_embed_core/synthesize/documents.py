"""A folder of documents: which of its files are read, and in which split each one is.

for document in read_documents("docs/", log): document.id, document.text, document.parsed
"""

from __future__ import annotations

import gzip
import hashlib
import heapq
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_embed_core.data.normal_form import has_content, normal_key
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.durable import sha256_file
from nemo_embed_core.synthesize.structure import SUFFIXES, Parsed, parse

MAX_BYTES = 32 << 20  # of a file: beyond it is data, not a document


@dataclass(frozen=True)
class Document:
    id: str  # its path in the folder, as shown() has it
    text: str
    parsed: Parsed


def shown(path: str | Path) -> str:
    """A path as text: a byte of a file's name that is not UTF-8 as \\xe9."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def name_of(folder: str | Path) -> str:
    """Of the documents as a whole, in datasets that are made of them."""
    return shown(Path(folder).resolve().name)


def read_documents(
    folder: str | Path, log: Callable[[str], None], most: int = 0, seed: int = 0
) -> Iterator[Document]:
    """Files of SUFFIXES, also with .gz, below the folder, in the order of their paths; hidden ones are not.

    UTF-8, with or without a byte order mark. What is left out is counted and said with the first file of each
    reason: another suffix, another encoding, a copy of an earlier document (in the normal form), no content,
    over MAX_BYTES, a file or folder that cannot be read. UserError where nothing is left. Memory: one
    document, and of all others their paths and 16 bytes.

    most: files of these suffixes that are looked at, a sample by their paths alone; 0: all.
    """
    root, name = _root(folder), shown(folder)
    left_out, first, others = Counter[str](), dict[str, str](), Counter[str]()
    seen, count = set[bytes](), 0

    def leave_out(reason: str, path: Path) -> None:
        left_out[reason] += 1
        first.setdefault(reason, shown(path.relative_to(root)))

    candidates = _candidates(root, leave_out, others)
    chosen = _sample(candidates, root, most, seed)
    if len(chosen) < len(candidates):
        log(f"{name}: {len(chosen):,} of {len(candidates):,} files are read: max_documents={most}")
    for path in chosen:
        try:
            document = _read(path, shown(path.relative_to(root)), SUFFIXES[_suffix(path)], seen)
        except ValueError as error:
            leave_out(str(error), path)
            continue
        count += 1
        yield document
    if others:
        named = ", ".join(f"{suffix} {number:,}" for suffix, number in others.most_common(8))
        rest = ", ..." * (len(others) > 8)
        log(f"{name}: {others.total():,} files left out: another suffix ({named}{rest})")
    for reason, number in left_out.most_common():
        log(f"{name}: {number:,} files left out: {reason} (first: {first[reason]})")
    if not count:
        raise _nothing(folder)


def digest_of_documents(folder: str | Path, most: int = 0, seed: int = 0) -> str:
    """sha256 over names and bytes of the files that read_documents looks at; UserError where there are
    none."""
    root, digest = _root(folder), hashlib.sha256()
    chosen = _sample(_candidates(root, lambda *_: None, Counter()), root, most, seed)
    if not chosen:
        raise _nothing(folder)
    for path in chosen:
        digest.update(os.fsencode(path.relative_to(root)) + b"\0")
        try:
            digest.update(sha256_file(path).encode() if path.is_file() else b"-")
        except OSError:  # left out and said when it is read
            digest.update(b"-")
    return digest.hexdigest()


def _root(folder: str | Path) -> Path:
    if not (root := Path(folder)).is_dir():
        raise UserError(f"documents: {shown(root)} is no folder; give the folder that the documents are in")
    return root


def _nothing(folder: str | Path) -> UserError:
    suffixes = ", ".join(SUFFIXES)
    return UserError(
        f"documents: {shown(folder)} holds no document that can be read: files of {suffixes}, or .gz"
    )


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _candidates(root: Path, leave_out: Callable[[str, Path], None], others: Counter[str]) -> list[Path]:
    found = []
    for path in _files(root, leave_out):
        if _suffix(path) in SUFFIXES:
            found.append(path)
        else:
            others[shown(_suffix(path)) or "none"] += 1
    return found


def _sample(paths: list[Path], root: Path, most: int, seed: int) -> list[Path]:
    """Of the smallest hashes, in their order. Another hash than that of is_held_out: the sample would be of
    one split alone."""
    if not 0 < most < len(paths):
        return paths
    hashed = [
        (hashlib.sha256(f"{seed}\0sample\0{shown(path.relative_to(root))}".encode()).digest(), path)
        for path in paths
    ]
    return sorted(path for _, path in heapq.nsmallest(most, hashed))


def _files(root: Path, leave_out: Callable[[str, Path], None]) -> list[Path]:
    """All that is no folder, not hidden, in the order of the paths; links to folders are not followed."""

    def failed(error: OSError) -> None:
        leave_out(f"a folder that cannot be read ({error.strerror})", Path(error.filename))

    found: list[Path] = []
    for folder, folders, files in os.walk(root, onerror=failed):
        for name in sorted((*folders, *files)):
            if name.startswith("."):
                leave_out("hidden, as their names begin with a dot", Path(folder, name))
            elif name in folders and Path(folder, name).is_symlink():
                leave_out("a link to a folder, which is not followed", Path(folder, name))
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    return sorted(found)


def _read(path: Path, name: str, kind: str, seen: set[bytes]) -> Document:
    """ValueError with the reason why it is left out."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("no ordinary file")
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise ValueError("damaged gzip") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
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
