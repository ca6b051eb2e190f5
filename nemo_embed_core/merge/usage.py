"""How texts are encoded by a merged model: the sources' prompts, lengths, pooling and similarity, united."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nemo_embed_core.checkpoint.source import Prompts, Usage
from nemo_embed_core.data.prompts import query_prompt
from nemo_embed_core.errors import UserError

UNKNOWN_LENGTH = 512  # tokens, of a folder that says nothing


def united_usage(
    named: Sequence[tuple[str, Usage]],
    task: str | None = None,
    document_task: str | None = None,
    *,
    why_first: str = "it was given first",
) -> tuple[Usage, list[str]]:
    """(the usage of the merged model, what is to be said of it), of [(source's name, its usage), ...].

    prompts = union by name, lengths = max, dims = those of all, pooling and similarity: equal, or UserError.
    The default prompts are the first source's, unless `task` or `document_task` (instructions; None: the
    sources' own) choose; why_first is said of it where the others' are different ones.
    """
    first, said = named[0][1], list[str]()
    for attribute in ("pooling", "similarity"):
        values = {getattr(usage, attribute): name for name, usage in reversed(named)}
        if len(values) > 1:
            says = ", ".join(f"{name}: {value}" for value, name in values.items())
            differ = f"the sources differ in {attribute} ({says})"
            raise UserError(f"{differ}; only models that are used alike are averaged")
    prompts: dict[str, Prompts] = {}
    for source, usage in named:
        for name, entry in usage.prompts.items():
            if entry not in prompts.values():
                # "query" is no task's name: of a folder that has but one prompt.
                prompts[_free_name(source if name == "query" else name, prompts)] = entry
    defaults = {usage.default: name for name, usage in reversed(named)}
    default = first.default
    if task is not None or document_task is not None:
        if task is not None:
            query = query_prompt(task)
            new = Prompts(query, default.document)
            default = next((p for p in prompts.values() if p.query == query), new)
        if document_task is not None:
            default = default._replace(document=query_prompt(document_task))
        options = (("task", task), ("document-task", document_task))
        given = [f"--{k} {v!r}" for k, v in options if v is not None]
        said.append(f"default prompts: as {' and '.join(given)} say{'s' if len(given) == 1 else ''}")
    elif len(defaults) > 1:
        said.append(
            f"WARNING: the sources have {len(defaults)} default prompts; {named[0][0]}'s is the default of "
            f"the merged model, because {why_first}: choose with --task and --document-task"
        )
    elif len(prompts) > 1:
        name = next((name for name, entry in prompts.items() if entry == default), "the folder")
        chosen = f"those of {name}, the sources' own default"
        said.append(f"default prompts: {chosen}; choose another task's with --task")
    if default in prompts.values():
        at = next(name for name, entry in prompts.items() if entry == default)
        prompts = {at: default} | prompts
    elif prompts or any(default):
        prompts = {_free_name("default", prompts): default, **prompts}
    lengths: dict[str, Any] = {}
    for attribute in ("query_max_length", "document_max_length"):
        known = sorted({getattr(usage, attribute) for _, usage in named} - {None})
        lengths[attribute] = known[-1] if known else UNKNOWN_LENGTH
        if not known:
            said.append(f"{attribute} is not known to the sources: {UNKNOWN_LENGTH} tokens are written")
        elif len(known) > 1:
            said.append(f"{attribute}: the sources have {known} tokens, the largest is written")
    dims = tuple(dim for dim in first.dims if all(dim in usage.dims for _, usage in named))
    if others := sorted({dim for _, usage in named for dim in usage.dims} - set(dims)):
        said.append(f"widths {', '.join(map(str, others))} are not said by all sources: not written")
    return replace(first, prompts=prompts, dims=dims, **lengths), said


def _free_name(name: str, taken: Mapping[str, Any]) -> str:
    """`name` or name-2, name-3...: neither a task's nor a key that sentence-transformers gets for it."""
    keys = {"query", "document", *taken, *(f"{other}-document" for other in taken)}
    for count in itertools.count(1):
        free = name if count == 1 else f"{name}-{count}"
        if free not in keys and f"{free}-document" not in taken:
            return free
    raise AssertionError
