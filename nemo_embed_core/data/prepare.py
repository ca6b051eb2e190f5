"""Any sources as dataset folders (data/dataset.py): text is written once, and training goes on from ids.

config = write_datasets(config, "data/mix", print)     # its datasets are the folders now
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path

from nemo_embed_core.config import DataConfig, DatasetConfig
from nemo_embed_core.config.data import RowsConfig
from nemo_embed_core.data.building import Log
from nemo_embed_core.data.dataset import Metadata, is_dataset, read_metadata
from nemo_embed_core.data.dataset_writer import write_dataset
from nemo_embed_core.data.mix import names_of
from nemo_embed_core.data.prompts import query_prompt
from nemo_embed_core.data.readers import Row, check_sources, has_corpus, read_beir, read_rows, with_tasks
from nemo_embed_core.errors import DataError, UserError


def write_datasets(config: DataConfig, folder: str | Path, log: Log = print) -> DataConfig:
    """Reads every row once to check it and once to write it; several datasets go into folder/NAME each.

    UserError where a folder is there already, before anything is read, and for rows of several instructions.
    """
    if not config.datasets:
        raise UserError("data.datasets is empty: name at least one file of rows or BEIR folder")
    named = dict(zip(names_of(config.datasets), config.datasets, strict=True))
    folders = {name: Path(folder) / name if len(named) > 1 else Path(folder) for name in named}
    for path in folders.values():
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} exists and is not empty; choose another folder or delete it")
    findings = check_sources(config.datasets, log)
    for line in findings.lines():
        log(line)
    for name, dataset in named.items():
        counts = _write(name, with_tasks(dataset), folders[name])
        log(
            f"wrote {folders[name]}: "
            + ", ".join(f"{n:,} {what.replace('_', ' ')}" for what, n in counts.items())
        )
    read = DatasetConfig(path="")  # what is said of reading and instructions is in the folder now
    as_read = {f.name: getattr(read, f.name) for f in fields(RowsConfig)}
    as_read |= {name: getattr(read, name) for name in ("task", "document_task", "split", "on_missing")}
    written = [replace(d, path=str(folders[name]), **as_read) for name, d in named.items()]
    return replace(config, datasets=written)


def _write(name: str, dataset: DatasetConfig, folder: Path) -> dict[str, int]:
    prompt: str | None = None

    def rows() -> Iterator[Row]:
        for row in read_rows(dataset):
            own = query_prompt(dataset.task if row.prompt is None else row.prompt)
            if own != prompt:
                raise DataError(
                    row.path,
                    row.line,
                    f"the instruction {own!r} is not that of the first row, {prompt!r}: a dataset folder has "
                    "one for all its queries; write a folder for each",
                )
            yield row

    first = next(read_rows(dataset))
    prompt = query_prompt(dataset.task if first.prompt is None else first.prompt)
    document_prompt = query_prompt(dataset.document_task)
    about = read_metadata(Path(dataset.path)) if is_dataset(dataset.path) else Metadata(corpus_id=name)
    about = replace(
        about,
        query_instruction=instruction(prompt),
        passage_instruction=instruction(document_prompt),
        ids_only=False,
        source=about.source or Path(dataset.path).name,
    )
    documents: Iterable[tuple[str, str]] = ()
    if has_corpus(dataset):
        documents = read_beir(dataset).corpus.items()
    return write_dataset(folder, rows(), about, ((key, text) for key, text in documents if text))


def instruction(prompt: str) -> str:
    """As a dataset folder has it, where a space follows; UserError for a prompt that ends in none."""
    if prompt and not prompt.endswith(" "):
        raise UserError(
            f"the prompt {prompt!r} does not end in a space, which a dataset folder puts behind each"
        )
    return prompt[:-1]
