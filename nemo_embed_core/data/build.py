"""Which token store a run reads: named by a digest of all that makes it, opened where it is, else built.

    open_store(config, tokenizer)      opened when cache_dir has it, else compiled, verified, published

While it is built a store is a folder cache_dir/.building-*, which its process holds with a lock.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_embed_core.config import DataConfig, DatasetConfig
from nemo_embed_core.data.building import Log, building, publish
from nemo_embed_core.data.compile import check_dropped, check_task, compile_store
from nemo_embed_core.data.prompts import query_prompt
from nemo_embed_core.data.readers import GROUPED, files_of, has_corpus, is_beir, reading, with_tasks
from nemo_embed_core.data.store import FORMAT_VERSION, Store, damaged, read_manifest, report
from nemo_embed_core.data.texts import texts_in
from nemo_embed_core.data.tokenizer import Tokenizer
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.durable import make_folder, sha256_file, write_atomically
from nemo_embed_core.files.strict_json import read_object


def open_store(config: DataConfig, tokenizer: Tokenizer, log: Log = print) -> Store:
    """The store of these datasets, tokenizer and lengths.

    With config.store it is opened by its digest or folder and the sources are not looked at. Several
    processes may call this at once: each builds its own copy and one rename wins, so to save work let one
    rank build first. Raises DataError for bad rows (the first 20 of all sources, and how many; config.on_bad
    may leave them out instead) and UserError for a damaged store or a too short max_length.
    """
    config = with_store(config)
    if config.store:
        store = Store(store_folder(config))
        _check_same_made(store, config, tokenizer)
        check_dropped(store.manifest, config)
        log(report(store))
        return store
    if not config.datasets:
        raise UserError("data.datasets is empty: name at least one file of rows or BEIR folder")
    check_prompts(config, tokenizer)
    for dataset in config.datasets:
        if has_corpus(dataset) and not is_beir(dataset):  # which has no instructions of its own
            before = [repr(query_prompt(task)) for task in (dataset.task, dataset.document_task)]
            log(f"{dataset.path}: queries begin with {before[0]}, documents with {before[1]}")
    try:
        files = files_of(config.datasets)
    except UserError as error:
        raise UserError(f"{error}{_stores_of(config)}") from None
    stamps = _stamps(config)
    header = _header(config, tokenizer, files)
    digest = header["digest"]
    folder = Path(config.cache_dir) / digest[:32]
    if not folder.exists():
        try:
            with building(folder, log) as temporary, texts_in(folder.parent):
                compile_store(temporary, config, tokenizer, header, log)
                if _stamps(config) != stamps:
                    raise UserError(
                        "a data file changed while it was being tokenised; start again when it is complete"
                    )
                Store(temporary).verify()
                publish(temporary, folder)
        except OSError as error:
            raise UserError(
                f"the store cannot be written to {folder}: {error.strerror} (data.cache_dir)"
            ) from error
    store = Store(folder)
    if store.digest != digest:
        raise damaged(folder, f"its manifest has digest {store.digest[:12]} instead of {digest[:12]}")
    check_dropped(store.manifest, config)
    log(report(store))
    return store


def check_prompts(config: DataConfig, tokenizer: Tokenizer) -> None:
    for dataset in config.datasets:
        check_task(config, dataset, "query", dataset.task, tokenizer)
        check_task(config, dataset, "document", dataset.document_task, tokenizer)


def _header(config: DataConfig, tokenizer: Tokenizer, files: list[list[Path]]) -> dict[str, Any]:
    """The beginning of the manifest: all that makes the store, and its digest. files: of each dataset."""
    hashes = file_hashes([file for group in files for file in group], Path(config.cache_dir))
    sources: list[dict[str, Any]] = [
        {
            "path": str(dataset.path),
            "task": dataset.task,
            "document_task": dataset.document_task,
            "files": {str(file): hashes[file] for file in group},
            "reading": reading(dataset),
            "row_file": str(group[-1] if group else dataset.path),  # of a BEIR folder the qrels
        }
        for dataset, group in zip(config.datasets, files, strict=True)
    ]

    def facts(grouped: bool = True) -> list[list[str]]:
        return [
            [*source["files"].values(), source["task"], source["document_task"]]
            + [fact for fact in source["reading"] if grouped or fact != GROUPED]
            for source in sources
        ]

    made_of = {
        "version": FORMAT_VERSION,
        "tokenizer": tokenizer.digest,
        **_max_lengths(config),
        # The content of the files, not their names: a moved data set keeps its store.
        "sources": facts(),
    }
    header = {**made_of, "sources": sources, "digest": digest_of(made_of), "end_tokens": tokenizer.end_tokens}
    if not any(source["reading"] for source in sources):
        # What a checkpoint from before has, where nothing is left out.
        header["digest_v1"] = digest_of({**made_of, "version": 1})
    if any(GROUPED in source["reading"] for source in sources):
        # What a checkpoint has whose store did not know the groups of rows.
        header["digest_ungrouped"] = digest_of({**made_of, "sources": facts(grouped=False)})
    return header


def _max_lengths(config: DataConfig) -> dict[str, int | list[int]]:
    """Of each side the length that all datasets have, or each one's: what a store says of them."""
    queries, documents = map(list, zip(*config.all_lengths(), strict=True))
    found = {"query_max_length": queries, "document_max_length": documents}
    return {side: each[0] if len(set(each)) == 1 else each for side, each in found.items()}


def digest_of(made_of: Any) -> str:
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------ without the sources


def store_folder(config: DataConfig) -> Path:
    """config.store is a store's folder, its digest, or the first letters of that."""
    folder = Path(config.store)
    if folder.is_dir():
        return folder
    found = sorted(path for path in Path(config.cache_dir).glob(f"{config.store}*") if path.is_dir())
    if not found and len(config.store) > 32:
        found = [path for path in [Path(config.cache_dir) / config.store[:32]] if path.is_dir()]
    if len(found) != 1:
        have = ", ".join(path.name for path in found or sorted(Path(config.cache_dir).glob("[0-9a-f]*"))[:10])
        raise UserError(
            f"data.store={config.store} is neither the folder of a store nor the beginning of "
            f"{'one' if found else 'a'} digest in data.cache_dir={config.cache_dir}, which has: "
            f"{have or 'none'}"
        )
    return found[0]


def with_store(config: DataConfig) -> DataConfig:
    """config with its store's datasets where it names none, and the instructions that the data has, where it
    names none: instructions belong to the run, as do lengths that all datasets share."""
    if not config.store or config.datasets:
        return replace(config, datasets=[with_tasks(dataset) for dataset in config.datasets])
    manifest, keys = read_manifest(store_folder(config)), ("path", "task", "document_task")
    datasets = [DatasetConfig(**{key: source[key] for key in keys}) for source in manifest["sources"]]
    for side in ("query_max_length", "document_max_length"):
        if isinstance(each := manifest[side], list):
            datasets = [replace(d, **{side: n}) for d, n in zip(datasets, each, strict=True)]
    return replace(config, datasets=datasets)


def _check_same_made(store: Store, config: DataConfig, tokenizer: Tokenizer) -> None:
    was = store.manifest
    facts: list[tuple[str, Any, Any]] = [
        ("the tokenizer (sha256)", was["tokenizer"], tokenizer.digest),
        *((f"data.{side}", was[side], now) for side, now in _max_lengths(config).items()),
    ]
    for name in ("task", "document_task") if config.datasets else ():
        now = [getattr(dataset, name) for dataset in config.datasets]
        facts.append((f"data.datasets (its {name}s)", [source[name] for source in was["sources"]], now))
    for name, before, now in facts:
        if before != now:
            raise UserError(
                f"data.store={config.store} was built with other options: {name} was {before!r}, now {now!r}"
            )


def _stores_of(config: DataConfig) -> str:
    """A hint for missing sources: the stores that were built of them."""
    wanted = [str(dataset.path) for dataset in config.datasets]
    found = []
    for path in sorted(Path(config.cache_dir).glob("[0-9a-f]*/manifest.json")):
        with suppress(UserError, KeyError, TypeError, AttributeError):
            manifest = read_object(path)
            if [source.get("path") for source in manifest["sources"]] == wanted:
                found.append(path.parent.name)
    if not found:
        return ""
    return f". A store was built of it: --data.store {found[-1]} opens that without the sources"


# ------------------------------------------------------------------------------------------ sources


def _stamps(config: DataConfig) -> list[tuple[str, int, int]]:
    """(file, size, mtime) of all sources: what changes when somebody still writes to one."""
    files = [file for group in files_of(config.datasets) for file in group]
    return [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]


def file_hashes(files: list[Path], cache_dir: Path) -> dict[Path, str]:
    """sha256 of each file; one that sources.json knows by size, times and inode is not read again."""
    record = cache_dir / "sources.json"
    known: dict[str, list[Any]] = {}
    with suppress(UserError):
        known = read_object(record)
    hashes, new = {}, False
    for file in files:
        stat, name = file.stat(), str(file.resolve())
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        entry = known.get(name)
        if isinstance(entry, list) and entry[:4] == stamp and len(entry) == 5:
            hashes[file] = entry[4]
            continue
        hashes[file] = sha256_file(file)
        # A write within the clock's step may not show in the times.
        if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > 2_000_000_000:
            known[name], new = [*stamp, hashes[file]], True
    if new:
        with suppress(OSError):  # a cache_dir that cannot be written to serves the stores that it has
            make_folder(cache_dir)
            write_atomically(record, json.dumps(known).encode(), shared=True)
    return hashes
