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
from typing import Any

from nemo_embed_core.checkpoint.source import Source, resolve
from nemo_embed_core.config import MineConfig, MineDatasetConfig
from nemo_embed_core.config.data import dataset_names
from nemo_embed_core.data.dataset import is_dataset
from nemo_embed_core.data.formats.writing import write_lines
from nemo_embed_core.data.normal_form import exact_key
from nemo_embed_core.data.prompts import query_prompt
from nemo_embed_core.data.readers import Findings, is_beir, read_rows, with_tasks
from nemo_embed_core.data.texts import texts_in
from nemo_embed_core.encoders.precomputed import precomputed_sides
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.durable import refuse_inputs, write_atomically
from nemo_embed_core.files.strict_json import read_object
from nemo_embed_core.mine.corpus import Ranks
from nemo_embed_core.mine.folder import read_folder
from nemo_embed_core.mine.formats import FORMATS, convert_all
from nemo_embed_core.mine.inputs import by_ids, documents_of, input_files, read_all
from nemo_embed_core.mine.negatives import mine_negatives
from nemo_embed_core.mine.output import FolderWriter
from nemo_embed_core.mine.pool import Known, Row, Rows
from nemo_embed_core.mine.report import plot_datasets, plot_report, print_groups
from nemo_embed_core.mine.teachers import Teachers, check_source, using

Log = Callable[[str], None]
REPORTS = (".report.json", ".report.png")


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
    ranks = ranks or Ranks()
    with texts_in(config.output or None):
        found = read_all(config, datasets, log, ranks)
    plan = Plan(config, datasets, sources, usage, found.known, found.excluded)
    refuse_inputs(_written(plan), input_files(config, datasets.values()))
    for name in datasets:
        _writer(plan, name), _prompts(plan, name)  # refuse now what they would in hours
    _check_disk(plan, found.counts, found.num_bytes * ranks.size)
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


def _written(plan: Plan) -> Iterator[Path]:
    """Every file whose name an input may have."""
    outputs = [plan.output(name) for name in plan.datasets]
    suffixes = ["", *(f".{form}{FORMATS[form].SUFFIX}" for form in plan.config.formats)]
    for output in outputs:
        yield from (output.with_name(output.name + suffix) for suffix in [*suffixes, *REPORTS])
    if len(outputs) > 1:
        yield from (Path(plan.config.output) / f"report{suffix}" for suffix in (".json", ".png"))


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


# --------------------------------------------------------------------------------------- room on the disk


def _check_disk(plan: Plan, counts: dict[str, tuple[int, int]], num_bytes: int) -> None:
    """Embeddings of all data sets and models, less what is there of an earlier run; and the texts that ranks
    keep beside them while a data set is mined."""
    if not plan.config.output:
        return
    needed = num_bytes
    for name, (num_documents, num_queries) in counts.items():
        for source, usage in zip(plan.sources, plan.usage[name], strict=True):
            dtype = plan.config.dtype or ("float16" if usage["similarity"] == "cosine" else "float32")
            needed += (num_documents + num_queries) * _hidden_size(source) * (2 if dtype == "float16" else 4)
        work = plan.output(name).with_name(plan.output(name).name + ".work")
        needed -= sum(file.stat().st_size for file in work.rglob("*.npy"))
    folder = next(p for p in Path(plan.config.output).absolute().parents if p.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        texts = f" and {num_bytes / 2**30:,.1f} GiB of texts" if num_bytes >= 2**27 else ""
        sizes = f"take {needed / 2**30:,.1f} GiB and {folder} has {free / 2**30:,.1f} GiB free"
        raise UserError(f"the embeddings{texts} {sizes}: choose another --output, or make room")


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
    datasets = named_datasets(config).values()
    refuse_inputs((folder / "documents.jsonl", folder / "queries.jsonl"), input_files(config, datasets))
    folder.mkdir(parents=True, exist_ok=True)
    with texts_in(folder):
        _write_texts(config, datasets, folder, log)


def _write_texts(config: MineConfig, datasets: Iterable[MineDatasetConfig], folder: Path, log: Log) -> None:
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


def _rows(plan: Plan, dataset: MineDatasetConfig, ranks: Ranks) -> Iterable[Row] | Rows:
    if not by_ids(plan.config, dataset):
        return read_rows(dataset.as_data())
    findings = Findings()
    table = read_folder(dataset.as_data(), ranks, findings, plan.known, plan.excluded)
    findings.raise_bad()
    assert table is not None
    return table


def mine(
    plan: Plan, ranks: Ranks, device: Any, load: Callable[[Source], Any], log: Log = print
) -> dict[str, Any]:
    """Every data set of the plan into its file; the reports by name. load: an encoder of a Source."""
    with texts_in(plan.config.output or None):
        return _mine(plan, ranks, device, load, log)


def _mine(plan: Plan, ranks: Ranks, device: Any, load: Callable[[Source], Any], log: Log) -> dict[str, Any]:
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
