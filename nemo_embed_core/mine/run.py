"""One mining run: what is mined with what, checked before anything is encoded, then data set after data set.

    plan = make_plan(config)         # reads every file once; UserError with all that is wrong
    mine(plan, ranks, device, load)  # load(source) -> an encoder

Prompts, lengths and similarity are the model's own (checkpoint/source.py) unless an option says otherwise.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from nemo_embed_core.checkpoint.source import Source, resolve
from nemo_embed_core.config import DatasetConfig, MineConfig, MineDatasetConfig
from nemo_embed_core.config.data import dataset_names
from nemo_embed_core.data.dataset import is_dataset
from nemo_embed_core.data.formats.beir import splits as beir_splits
from nemo_embed_core.data.formats.writing import write_lines
from nemo_embed_core.data.normal_form import exact_key, normal_key
from nemo_embed_core.data.prompts import query_prompt
from nemo_embed_core.data.readers import (
    BadLines,
    Findings,
    has_corpus,
    is_beir,
    read_beir,
    read_documents,
    read_rows,
    with_tasks,
)
from nemo_embed_core.encoders.precomputed import precomputed_sides
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.durable import write_atomically
from nemo_embed_core.files.strict_json import read_object
from nemo_embed_core.mine.corpus import Ranks
from nemo_embed_core.mine.folder import FolderRows, is_read_by_ids, read_folder
from nemo_embed_core.mine.formats import FORMATS, convert_all
from nemo_embed_core.mine.negatives import mine_negatives
from nemo_embed_core.mine.output import FolderWriter
from nemo_embed_core.mine.pool import Document, Known, Row, Rows
from nemo_embed_core.mine.report import plot_datasets, plot_report, print_groups
from nemo_embed_core.mine.teachers import Teachers, check_source, using

Log = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """A run whose inputs have been read once: nothing of it can be found wrong hours later."""

    config: MineConfig
    datasets: dict[str, MineDatasetConfig]
    sources: list[Source]
    usage: dict[str, list[dict[str, Any]]]  # by data set: of each source, what its Teacher gets
    known: Known
    excluded: set[bytes] = field(default_factory=set)

    def output(self, name: str) -> Path:
        output = Path(self.config.output)
        suffix = "" if self.config.output_format == "dataset" else ".jsonl"
        return output / f"{name}{suffix}" if len(self.datasets) > 1 else output


def make_plan(config: MineConfig, log: Log = print, ranks: Ranks | None = None) -> Plan:
    """The run, checked: options, models, prompts, outputs, every row of every file, free disk.

    All ranks call it, as they read dataset folders together; log is told on each.
    """
    _check_options(config)
    datasets = named_datasets(config)
    sources = [resolve(model) for model in config.models]
    usage = {
        name: [using(source, name, dataset, config, log) for source in sources]
        for name, dataset in datasets.items()
    }
    for i, source in enumerate(sources):
        check_source(
            source, datasets.values(), [of_dataset[i] for of_dataset in usage.values()], config.precision
        )
    known, excluded, counts = _read_all(config, datasets, log, ranks or Ranks())
    plan = Plan(config, datasets, sources, usage, known, excluded)
    for name in datasets:
        _writer(plan, name)  # refuses now what it would in hours
    _check_disk(plan, counts)
    return plan


def _check_options(config: MineConfig) -> None:
    unknown = sorted(set(config.formats) - set(FORMATS))
    if unknown:
        raise UserError(f"formats={unknown}: none of {', '.join(FORMATS)}")
    if not config.output:
        return
    output, is_single = Path(config.output), len(config.datasets) <= 1
    if config.output_format == "dataset" and is_single:
        is_folder = output.is_dir() and (not any(output.iterdir()) or _is_of_a_killed_run(config, output))
        if output.exists() and not is_folder:
            raise UserError(f"output {config.output} exists and is not an empty folder: choose another name")
    elif output.exists() and output.is_dir() == is_single:
        what = "a file, and several need a folder"
        what = "a folder, and one dataset is written to a file" if is_single else what
        raise UserError(f"output {config.output} is {what}: choose another name")
    folder = next(p for p in output.absolute().parents if p.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"output {config.output}: {folder} cannot be written to; choose another place")


def _is_of_a_killed_run(config: MineConfig, output: Path) -> bool:
    """Whether this dataset folder is one to go on with: its work is there, the last report is not."""
    of_all = Path(config.output) / "report.json" if config.datasets[1:] else None
    report = of_all or output.with_name(output.name + ".report.json")
    has_work = output.with_name(output.name + ".work").is_dir()
    return is_dataset(output) and has_work and not report.exists()


def named_datasets(config: MineConfig) -> dict[str, MineDatasetConfig]:
    """The name of each dataset's file or folder, with a number where two have the same."""
    names = {f.name for f in dataclasses.fields(MineDatasetConfig)} - {"path"}
    base = {name: getattr(config, name) for name in names}
    datasets = config.datasets or [MineDatasetConfig(path=config.data, **base)]
    stems = dataset_names(dataset.path for dataset in datasets)
    return dict(zip(stems, map(_with_tasks, datasets), strict=True))


def _with_tasks(dataset: MineDatasetConfig) -> MineDatasetConfig:
    """With the instructions that the data itself has, where no option says any."""
    own = with_tasks(dataset.as_data())
    task = own.task or None if dataset.task is None else dataset.task
    document_task = own.document_task or None if dataset.document_task is None else dataset.document_task
    return dataclasses.replace(dataset, task=task, document_task=document_task)


# ------------------------------------------------------------------------------------------ what is read


def documents_of(config: MineConfig, dataset: MineDatasetConfig) -> Iterator[Document]:
    """Documents to search beside those of the rows: of a BEIR folder the whole corpus, and --corpus."""
    if has_corpus(dataset.as_data()) and config.pool == "all":
        corpus = read_beir(dataset.as_data()).corpus
        yield from (Document(corpus[key], key) for key in corpus)
    if config.corpus:
        yield from (Document(text, key) for key, text in read_documents(config.corpus, config.on_missing))


def by_ids(config: MineConfig, dataset: MineDatasetConfig) -> bool:
    return is_read_by_ids(dataset.as_data(), has_more_documents=bool(config.corpus))


def _read_all(
    config: MineConfig, datasets: dict[str, MineDatasetConfig], log: Log, ranks: Ranks
) -> tuple[Known, set[bytes], dict[str, tuple[int, int]]]:
    """(known relevance over all data sets and splits, keys of --exclude, (documents, queries) by name).

    UserError with every file that does not exist, the first 20 bad lines of all others and their number.
    """
    known, findings, excluded = Known(), Findings(log=log), set[bytes]()
    unread: list[str] = []

    def readable(items: Iterable[T]) -> Iterator[T]:
        try:
            yield from items
        except UserError as error:  # the file is missing, say; its bad lines go to `findings`
            unread.append(str(error))

    corpus = read_documents(config.corpus, config.on_missing, findings) if config.corpus else ()
    num_corpus = sum(1 for _ in readable(corpus))
    for path in config.exclude:
        excluded.update(readable(_excluded(path, findings)))
    counts: dict[str, tuple[int, int]] = {}
    for name, dataset in datasets.items():
        if by_ids(config, dataset):
            counts[name] = (0, 0)
            for table in readable(_folders(dataset, ranks, findings)):
                known.queries += table.known.queries
                known.documents += table.known.documents
                counts[name] = (len(table.pool.texts), len(table))
            continue
        documents, num_rows = set[int](), 0
        for row in readable(read_rows(dataset.as_data(), findings)):
            known.add(row.query, row.pos)
            if config.output_format == "dataset" and row.prompt is not None:
                what = "the row has an instruction of its own, a dataset folder one for all: output_format"
                findings.bad(Path(row.path), row.line, f"{what} jsonl keeps it")
            documents.update(hash(text) for text in (*row.pos, *row.neg))
            num_rows += 1
        counts[name] = (len(documents) + num_corpus, num_rows)
    if unread:
        bad = [str(BadLines(findings.named, findings.num_bad))] if findings.num_bad else []
        raise UserError("\n".join([*dict.fromkeys(unread), *bad]))
    findings.raise_bad()
    for line in findings.lines():
        log(line)
    for name, dataset in datasets.items():
        if has_corpus(dataset.as_data()) and not by_ids(config, dataset):
            findings = Findings(log=log)
            whole = read_beir(dataset.as_data(), findings)
            counts[name] = (len(whole.corpus) + num_corpus, counts[name][1])
        _read_other_splits(config, name, dataset, known, log)
    if excluded:
        log(f"--exclude: {len(excluded):,} documents are not searched")
    return known, excluded, counts


def _folders(dataset: MineDatasetConfig, ranks: Ranks, findings: Findings) -> Iterator[FolderRows]:
    """One, or none where a row is bad."""
    if (table := read_folder(dataset.as_data(), ranks, findings)) is not None:
        yield table


def _rows(plan: Plan, dataset: MineDatasetConfig, ranks: Ranks) -> Iterable[Row] | Rows:
    if not by_ids(plan.config, dataset):
        return read_rows(dataset.as_data())
    findings = Findings()
    table = read_folder(dataset.as_data(), ranks, findings, plan.known, plan.excluded)
    findings.raise_bad()
    assert table is not None
    return table


def _excluded(path: str, findings: Findings) -> Iterator[bytes]:
    """Normal keys of the documents of `file.jsonl[.gz]`, or of those judged in `beir/folder:split`."""
    folder, _, split = path.rpartition(":")
    if folder and Path(folder).is_dir():
        beir = read_beir(DatasetConfig(path=folder, split=split, on_missing="allow"), findings)
        judged = dict.fromkeys(doc for scores in beir.qrels.values() for doc in scores)
        yield from (normal_key(beir.corpus[doc]) for doc in judged if doc in beir.corpus)
    elif Path(path).is_dir():
        add = f"add the split whose documents are meant, as {path}:test"
        raise UserError(f"exclude {path} is a folder: {add}")
    else:
        yield from (normal_key(text) for _, text in read_documents(path, "allow", findings))


def _read_other_splits(
    config: MineConfig, name: str, dataset: MineDatasetConfig, known: Known, log: Log
) -> None:
    """Adds the judgements of a BEIR folder's other splits to `known`; says how many only they have."""
    data = dataset.as_data()
    others = [split for split in beir_splits(Path(data.path)) if split != data.split] if is_beir(data) else []
    if not others:
        return
    own = {key for row in read_rows(data) for key in row.pos_ids}
    for split in others:
        findings, judged = Findings(), set[str]()
        for row in read_rows(dataclasses.replace(data, split=split, on_missing="allow"), findings):
            known.add(row.query, row.pos)
            judged.update(row.pos_ids)
        if findings.num_bad:
            bad = f"{findings.num_bad:,} bad lines, the first {findings.named[0]}"
            log(f"{name}: split {split} has {bad}: what it judges relevant is not all known")
        option = f"{dataset.path}:{split}"
        if only := len(judged - own):
            what = f"searched too; --exclude {option} leaves them out"
            what = "not searched" if option in config.exclude else what
            log(f"{name}: {only:,} documents are relevant in split {split} only: {what}")


def _check_disk(plan: Plan, counts: dict[str, tuple[int, int]]) -> None:
    """Embeddings of all data sets and models, less what is there of an earlier run."""
    if not plan.config.output:
        return
    needed = 0
    for name, (num_documents, num_queries) in counts.items():
        for source, usage in zip(plan.sources, plan.usage[name], strict=True):
            dtype = plan.config.dtype or ("float16" if usage["similarity"] == "cosine" else "float32")
            needed += (num_documents + num_queries) * _hidden_size(source) * (2 if dtype == "float16" else 4)
        work = plan.output(name).with_name(plan.output(name).name + ".work")
        needed -= sum(file.stat().st_size for file in work.rglob("*.npy"))
    folder = next(p for p in Path(plan.config.output).absolute().parents if p.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        sizes = f"take {needed / 2**30:,.1f} GiB and {folder} has {free / 2**30:,.1f} GiB free"
        raise UserError(f"the embeddings {sizes}: choose another --output, or make room")


def _hidden_size(source: Source) -> int:
    """Columns of its embeddings; 0 where nothing says so."""
    if source.kind == "precomputed":
        return int(precomputed_sides(source.folder, None, texts=False)[0][0].shape[1])
    if source.model is not None:
        return source.model.hidden_size
    config = read_object(file) if (file := source.folder / "config.json").is_file() else {}
    return int(config.get("hidden_size") or 0)


# ------------------------------------------------------------------------------------------ the run


def write_texts(config: MineConfig, log: Log = print) -> None:
    """The texts that a run embeds, once each, for embedding elsewhere; --model takes them with the .npy."""
    _check_options(config)
    folder = Path(config.write_texts)
    folder.mkdir(parents=True, exist_ok=True)
    datasets = named_datasets(config).values()

    def documents() -> Iterator[str]:
        for dataset in datasets:
            for row in read_rows(dataset.as_data()):
                yield from (*row.pos, *row.neg)
            yield from (document.text for document in documents_of(config, dataset))

    queries = (row.query for dataset in datasets for row in read_rows(dataset.as_data()))
    for side, texts in (("documents", documents()), ("queries", queries)):
        seen: set[bytes] = set()
        write_atomically(folder / f"{side}.jsonl", _lines_once(texts, seen))
        log(f"wrote {folder / side}.jsonl: {len(seen):,} texts; put {side}.npy beside it, row i for line i")


def _lines_once(texts: Iterable[str], seen: set[bytes]) -> Iterator[bytes]:
    for text in texts:
        if (key := exact_key(text)) not in seen:
            seen.add(key)
            yield (json.dumps({"text": text}, ensure_ascii=False) + "\n").encode()


def mine(
    plan: Plan, ranks: Ranks, device: Any, load: Callable[[Source], Any], log: Log = print
) -> dict[str, Any]:
    """Every data set of the plan into its file; the reports by name. load: an encoder of a Source."""
    config, is_single = plan.config, len(plan.datasets) == 1
    can_plot = importlib.util.find_spec("matplotlib") is not None
    say = log if ranks.rank == 0 else (lambda _: None)
    teachers, reports = Teachers(plan.sources, load), {}
    failed: dict[str, str] = {}  # files of other formats, and why
    for name, dataset in plan.datasets.items():
        output = plan.output(name)
        if not is_single:
            say(f"\n{name}: {dataset.path}")
        reports[name] = mine_negatives(
            _rows(plan, dataset, ranks),
            teachers.of(dataset, plan.usage[name]),
            output,
            documents=() if by_ids(config, dataset) else documents_of(config, dataset),
            selection=config,
            sweep=config.sweep,
            known=plan.known,
            excluded=plan.excluded,
            keep_negatives=config.keep_negatives,
            negatives_are_judged=is_beir(dataset.as_data()),
            rows_are_searched=config.pool == "all",
            device=device,
            method=config.method,
            dtype=config.dtype,
            shard_size=config.shard_size,
            block_queries=config.block_queries,
            ranks=ranks,
            log=log,
            write=_writer(plan, name),
            with_texts=not (config.output_format == "dataset" and by_ids(config, dataset)),
        )
        if ranks.rank == 0:
            if can_plot:
                plot_report(reports[name], f"{output}.report.png")
            how = {"num_negatives": config.num_negatives, **_prompts(plan, name)}
            failed |= convert_all(output, config.formats, say, **how)
    if ranks.rank == 0 and not is_single:
        folder = Path(config.output)
        say("")
        print_groups("dataset", reports, config.num_negatives, say)
        write_atomically(folder / "report.json", json.dumps(reports, indent=1, ensure_ascii=False).encode())
        if can_plot:
            plot_datasets(reports, f"{folder}/report.png")
        say(f"wrote {folder}/report.json; to train: --data.datasets, each with the task it was mined with")
    if not can_plot:
        say("no pictures of the reports: pip install matplotlib")
    if failed:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in failed.items())
        raise UserError(f"all is mined, but {len(failed)} of --formats could not be written: {reasons}")
    return reports


def _prompts(plan: Plan, name: str) -> dict[str, str]:
    """The data set's instructions: given ones, else our model's."""
    dataset = plan.datasets[name]
    if plan.sources[0].kind in ("checkpoint", "llama"):
        return {key: plan.usage[name][0][key] for key in ("prompt", "document_prompt")}
    return {
        "prompt": query_prompt(dataset.task or ""),
        "document_prompt": query_prompt(dataset.document_task or ""),
    }


def _writer(plan: Plan, name: str) -> Callable[[Path, Iterator[dict[str, Any]]], None]:
    if plan.config.output_format == "jsonl":
        return write_lines
    output = plan.output(name)
    if output.is_dir() and any(output.iterdir()) and not _is_of_a_killed_run(plan.config, output):
        raise UserError(f"output {output} exists and is not empty: choose another name or delete it")
    dataset = plan.datasets[name]
    return FolderWriter(dataset.path, name, by_ids=by_ids(plan.config, dataset), **_prompts(plan, name))
