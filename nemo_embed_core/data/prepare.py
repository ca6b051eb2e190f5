"""Any sources as dataset folders (data/dataset.py): text is written once, and training goes on from ids.

config = write_datasets(config, "data/mix", print)     # its datasets are the folders now
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path

from nemo_embed_core.config import DataConfig, DatasetConfig
from nemo_embed_core.config.data import RowsConfig, names_of
from nemo_embed_core.data.build import check_prompts, digest_of, file_hashes
from nemo_embed_core.data.building import Log
from nemo_embed_core.data.compile import check_rows, rows_of
from nemo_embed_core.data.dataset import Metadata, is_dataset, read_metadata
from nemo_embed_core.data.dataset_writer import write_dataset
from nemo_embed_core.data.prompts import query_prompt
from nemo_embed_core.data.readers import (
    Findings,
    Row,
    has_corpus,
    read_beir,
    reading,
    source_files,
    with_tasks,
)
from nemo_embed_core.data.texts import texts_in
from nemo_embed_core.data.tokenizer import Tokenizer
from nemo_embed_core.errors import DataError, UserError


def check_datasets(config: DataConfig, tokenizer: Tokenizer | None = None, log: Log = print) -> Findings:
    """Reads every row as training would; tokenises nothing but instructions, and writes nothing."""
    config = _with_datasets(config)
    for dataset in config.datasets:
        query_prompt(dataset.task), query_prompt(dataset.document_task)  # say what is wrong with them
    if tokenizer is not None:
        check_prompts(config, tokenizer)
    with texts_in(config.cache_dir):
        findings = check_rows(config, tokenizer, log)
    left_out = f", {len(findings.dropped):,} bad lines left out" if findings.dropped else ""
    log(
        f"checked {findings.num_rows:,} rows of {len(config.datasets)} datasets{left_out}; nothing is written"
    )
    return findings


def write_datasets(
    config: DataConfig, folder: str | Path, log: Log = print, tokenizer: Tokenizer | None = None
) -> DataConfig:
    """Reads every row once to check it and once to write it; several datasets go into folder/NAME each.

    A folder that is there already and made of the same sources stays: a killed run goes on. UserError where
    another is in the way, before anything is read, and for rows of several instructions.
    """
    config = _with_datasets(config)
    named = dict(zip(names_of(config.datasets), config.datasets, strict=True))
    folders = {name: Path(folder) / name if len(named) > 1 else Path(folder) for name in named}
    made_of = {name: _made_of(name, dataset, config) for name, dataset in named.items()}
    todo = []
    for name, path in folders.items():
        if is_dataset(path) and read_metadata(path).made_of == made_of[name]:
            log(f"{path} is there, made of the same sources")
            continue
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} exists and is not empty; choose another folder or delete it")
        todo.append(name)
    with texts_in(folder):
        if todo:
            check_rows(replace(config, datasets=[named[name] for name in todo]), tokenizer, log)
        for name in todo:
            findings = Findings(strict=True, drop=config.on_bad == "drop")
            rows = rows_of(config, named[name], tokenizer, findings)
            counts = _write(name, named[name], folders[name], rows, findings, made_of[name])
            said = ", ".join(f"{n:,} {what.replace('_', ' ')}" for what, n in counts.items())
            log(f"wrote {folders[name]}: {said}")
    default = DatasetConfig(path="")  # what is said of reading and instructions is in the folder now
    as_read = {f.name: getattr(default, f.name) for f in fields(RowsConfig)}
    as_read |= {name: getattr(default, name) for name in ("task", "document_task", "split", "on_missing")}
    written = [replace(d, path=str(folders[name]), **as_read) for name, d in named.items()]
    return replace(config, datasets=written)


def _with_datasets(config: DataConfig) -> DataConfig:
    if not config.datasets:
        raise UserError("data.datasets is empty: name at least one file of rows or BEIR folder")
    return replace(config, datasets=[with_tasks(dataset) for dataset in config.datasets])


def _made_of(name: str, dataset: DatasetConfig, config: DataConfig) -> str:
    hashes = file_hashes(source_files(dataset), Path(config.cache_dir))
    parts = [name, Path(dataset.path).name, dataset.task, dataset.document_task, config.on_bad]
    return digest_of([*parts, list(hashes.values()), reading(dataset)])


def _write(
    name: str, dataset: DatasetConfig, folder: Path, found: Iterator[Row], findings: Findings, made_of: str
) -> dict[str, int]:
    """findings: of reading the rows `found`, which are there."""
    first = next(found)
    prompt = query_prompt(dataset.task if first.prompt is None else first.prompt)

    def rows() -> Iterator[Row]:
        for row in chain([first], found):
            own = query_prompt(dataset.task if row.prompt is None else row.prompt)
            if own != prompt:
                raise DataError(
                    row.path,
                    row.line,
                    f"the instruction {own!r} is not that of the first row, {prompt!r}: a dataset folder has "
                    "one for all its queries; write a folder for each",
                )
            yield row

    document_prompt = query_prompt(dataset.document_task)
    about = read_metadata(Path(dataset.path)) if is_dataset(dataset.path) else Metadata(corpus_id=name)
    about = replace(
        about,
        query_instruction=instruction(prompt),
        passage_instruction=instruction(document_prompt),
        task_type=about.task_type or dataset.task_type,
        ids_only=False,
        source=about.source or Path(dataset.path).name,
    )
    documents: Iterable[tuple[str, str]] = ()
    if has_corpus(dataset):
        documents = read_beir(dataset).corpus.items()
    documents = ((key, text) for key, text in documents if text)
    return write_dataset(folder, rows(), about, documents, made_of=made_of, dropped=findings.dropped)


def instruction(prompt: str) -> str:
    """As a dataset folder has it, where a space follows; UserError for a prompt that ends in none."""
    if prompt and not prompt.endswith(" "):
        raise UserError(
            f"the prompt {prompt!r} does not end in a space, which a dataset folder puts behind each"
        )
    return prompt[:-1]
