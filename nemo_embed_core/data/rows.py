"""How a record becomes a row: one module of data/formats/ for each format, told by the record's fields.

for row in file_rows(config, find(config.path, config.split), findings): ...
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.data.containers import HEADER
from nemo_embed_core.data.formats import (
    automodel,
    bitext,
    contrastors,
    f2llm,
    flagembedding,
    labels,
    ms_swift,
    ours,
    sentence_transformers,
    sts,
    tevatron,
)
from nemo_embed_core.data.formats.row import Row
from nemo_embed_core.data.lines import NOISE, Findings, is_noise, short
from nemo_embed_core.data.records import Record, Source, records
from nemo_embed_core.errors import DataError


class Format(Protocol):
    """A module of data/formats/: how a record becomes a row.

    It may also have COLUMNS = True: fields count by their order; columns(fields): where they stand in one of
    the fields; NUMBERS: fields that are numbers, also in
    CSV; scan(records): what row() gets as its fourth argument, of all records.
    """

    @property
    def NAME(self) -> str: ...
    @property
    def EXAMPLE(self) -> str: ...  # of a row, for messages
    @property
    def OPTIONAL(self) -> tuple[str, ...]: ...  # fields that a row may lack: null, then, in a columnar file
    def sniff(self, fields: dict[str, Any]) -> bool: ...
    @property
    def row(self) -> Callable[..., Row]: ...  # (fields, path, line): ValueError says what is wrong


FORMATS: tuple[Format, ...] = (
    ours, flagembedding, sentence_transformers, tevatron, automodel, contrastors, f2llm, ms_swift, sts,
    labels, bitext,
)  # fmt: skip


def file_rows(config: DatasetConfig, source: Source, findings: Findings) -> Iterator[Row]:
    """Of the source's records, in order; bad ones, and ids that stand twice, are `bad` in findings."""
    one = _named(config.format)
    if "no_in_batch_neg" in Path(config.path).name:  # FlagEmbedding's mark
        what = "data sets named no_in_batch_neg, whose negatives in batch are used all the same"
        findings.note(f"{what} (loss.in_batch)", Path(config.path), 1)
    order = list(config.columns)
    ids: dict[str, tuple[Path, int]] = {}
    more: tuple[Any, ...] | None = None
    for record in records(source, findings, (one or ours).EXAMPLE):
        path, line, fields = _chosen(record, config)
        try:
            if one is None and (one := _sniffed(fields)) is None:
                if source.is_text:
                    findings.bad(path, 1, _no_columns(fields))
                    return
                _refuse(fields)
            assert one is not None
            if more is None:
                more = (one.scan(_fields(source, config, one)),) if hasattr(one, "scan") else ()
                if one is not ours and not config.format:
                    what = f"data sets read as {one.NAME} (set their format where it is another)"
                    findings.note(what, path, line)
            fields = _as_written(fields, source, one)
            if getattr(one, "COLUMNS", False):
                fields = one.columns(fields) if hasattr(one, "columns") else fields
                order = order or list(fields)
                fields = _ordered(fields, order)
            elif order:
                raise ValueError(f"the dataset's columns are set, and {one.NAME} reads fields by their names")
            row = one.row(fields, str(path), line, *more)
            if row.id:
                first = ids.setdefault(row.id, (path, line))
                if first != (path, line):
                    where = f"line {first[1]}" if first[0] == path else f"{first[0]}:{first[1]}"
                    raise ValueError(f"id {short(row.id)} is already the id of {where}: make ids unique")
        except ValueError as error:
            findings.bad(path, line, str(error), row=True)
            continue
        _note_noise(row, path, line, findings)
        yield row


def format_of(config: DatasetConfig, source: Source) -> Format:
    """As reading it would find it, of the first record that is of one."""
    if one := _named(config.format):
        return one
    for record in records(source, Findings(), ours.EXAMPLE):
        try:
            one = _sniffed(_chosen(record, config).fields)
        except ValueError as error:
            raise DataError(record.path, record.line, str(error)) from None
        if one is not None or source.is_text:
            return one or ours
    return ours


def _named(name: str) -> Format | None:
    return next((one for one in FORMATS if name == one.NAME), None)


def _sniffed(fields: dict[str, Any]) -> Format | None:
    """The format whose fields these are; ValueError where two take them."""
    found = [one for one in FORMATS if one.sniff(fields)]
    if len(found) > 1:
        names = " and ".join(one.NAME for one in found)
        raise ValueError(
            f"fields {short(list(fields))} are those of {names}: set the dataset's format to one"
        )
    return found[0] if found else None


def _refuse(fields: dict[str, Any]) -> None:
    """ValueError for fields that no format has."""
    if meant := _meant(fields):
        raise ValueError(f"no format has these fields, {meant}")
    ours.check_fields(fields)  # which says how to write rows


def _no_columns(fields: dict[str, Any]) -> str:
    message = f"line 1 names the columns, {short(list(fields))}, and no format has these"
    meant = _meant(fields) or f"{HEADER}; or rename them, or set the dataset's format"
    return f"{message}: {meant}"


def _meant(fields: dict[str, Any]) -> str:
    """What to rename where a format has these fields in lower case."""
    lower = {name: name.strip().lower() for name in fields}
    found = [one.NAME for one in FORMATS if one.sniff({lower[name]: v for name, v in fields.items()})]
    renamed = ", ".join(f"{short(name)} to {meant}" for name, meant in lower.items() if name != meant)
    return f"{found[0]} has them in lower case: rename {renamed}" if found and renamed else ""


def _chosen(record: Record, config: DatasetConfig) -> Record:
    """Without the fields that are ignored, in the order of the dataset's columns."""
    fields, order = record.fields, config.columns
    if config.ignore:
        fields = {name: v for name, v in fields.items() if name not in config.ignore}
    if fields.keys() == set(order):
        fields = {name: fields[name] for name in order}
    return record._replace(fields=fields)


def _as_written(fields: dict[str, Any], source: Source, one: Format) -> dict[str, Any]:
    """Without what the container has to write where a row has nothing, and numbers where it has only text."""
    if source.is_columnar:
        return {name: v for name, v in fields.items() if v is not None or name not in one.OPTIONAL}
    if not source.is_text:
        return fields
    fields = {name: v for name, v in fields.items() if v or name not in one.OPTIONAL}
    for name in getattr(one, "NUMBERS", ()):
        if re.fullmatch(r"-?\d+(\.\d+)?([eE][-+]?\d+)?", fields.get(name, ""), re.ASCII):
            fields[name] = float(fields[name])
    return fields


def _fields(source: Source, config: DatasetConfig, one: Format) -> Iterator[dict[str, Any]]:
    for record in records(source, Findings(), one.EXAMPLE):
        yield _as_written(_chosen(record, config).fields, source, one)


def _ordered(fields: dict[str, Any], order: list[str]) -> dict[str, Any]:
    """In the order of the first row, or of the dataset's columns; the keys of a JSON object have none."""
    if fields.keys() != set(order):
        whose = "of the first row or of the dataset's columns"
        raise ValueError(f"columns {short(list(fields))} are not those {whose}, {short(order)}")
    return {name: fields[name] for name in order}


def _note_noise(row: Row, path: Path, line: int, findings: Findings) -> None:
    if any(not text[0].isalnum() and is_noise(text) for text in (row.query, *row.pos, *row.neg)):
        for name, texts in {"queries": [row.query], "positives": row.pos, "negatives": row.neg}.items():
            if count := sum(map(is_noise, texts)):
                findings.note(f"{name} {NOISE}", path, line, count)
