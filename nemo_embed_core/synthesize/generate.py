"""Rows that models write: planned, asked for, checked, and written as dataset folders.

generate(config, print) -> output/datasets/TASK, dataset folders; output/journal.jsonl, every answer

The journal is what was paid for; the folders are made of it anew by each call, and the same journal gives the
same bytes. Memory: 200 bytes a request, the accepted rows, the seed documents.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from nemo_embed_core.config.synthesize import GeneratorConfig, SynthesizeConfig
from nemo_embed_core.data.formats.row import check_number
from nemo_embed_core.data.near import signer
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.durable import make_folder
from nemo_embed_core.files.lock import hold
from nemo_embed_core.synthesize.ask import ask
from nemo_embed_core.synthesize.assemble import Made, Verdicts, duplicates, log_table, not_found, write
from nemo_embed_core.synthesize.chunks import chunks
from nemo_embed_core.synthesize.client import Endpoint, Generator, Request
from nemo_embed_core.synthesize.documents import is_held_out, read_documents
from nemo_embed_core.synthesize.journal import Journal
from nemo_embed_core.synthesize.plan import plan
from nemo_embed_core.synthesize.tasks import JUDGE, Item
from nemo_embed_core.synthesize.tasks import ask as prompt_of
from nemo_embed_core.synthesize.validate import Rejected, content, json_object, row_of

Log = Callable[[str], None]


def generate(config: SynthesizeConfig, log: Log = print) -> dict[str, dict[str, int]]:
    """What was counted, by task. UserError where nothing can be asked or no row is accepted."""
    signer()  # UserError before anything is paid
    output = Path(config.output)
    make_folder(output)
    if (descriptor := hold(output)) is None:
        raise UserError(f"{output} is in use by another process; wait until it ends or choose another output")
    try:
        return _generate(config, output, log)
    finally:
        os.close(descriptor)


def _generate(config: SynthesizeConfig, output: Path, log: Log) -> dict[str, dict[str, int]]:
    seeds = seed_documents(config, log) if config.documents else []
    generators = [_open(model, config) for model in config.generate.models]
    with closing(Journal(output / "journal.jsonl", log)) as journal:
        return _ask_and_write(config, seeds, generators, journal, log)


def _ask_and_write(
    config: SynthesizeConfig,
    seeds: list[tuple[str, str]],
    generators: list[Generator],
    journal: Journal,
    log: Log,
) -> dict[str, dict[str, int]]:
    if len(journal):
        log(f"{journal.path}: {len(journal):,} replies are there already, {journal.spent:.4f} spent at most")
    requests = [_requests(place, config, seeds) for place in range(len(generators))]
    failed = asyncio.run(ask(requests, generators, journal, config.generate, log))
    verdicts = Verdicts()
    made = _rows(config, seeds, journal, failed, verdicts)
    made = _compared(made, seeds, config, verdicts)
    if config.generate.judge is not None:
        made = _judged(made, config.generate.judge, config, journal, verdicts, log)
    for rows in made.values():
        for one in rows:
            verdicts.add(one.item, config.generate.models[one.item.model].name, "accepted")
    log_table(verdicts, log)
    made = {name: rows for name, rows in made.items() if rows}
    if not made:
        raise UserError(
            f"none of {len(journal):,} replies is accepted; {journal.path} has them, the lines above say why"
        )
    report = {"spent": journal.spent, "tokens": journal.tokens, "replies": len(journal)}
    shutil.rmtree(
        Path(config.output) / "datasets", ignore_errors=True
    )  # of an earlier call, made of the same journal
    counts = write(made, seeds, config, verdicts, report)
    prompt, answer = journal.tokens
    log(f"{len(journal):,} replies, {prompt:,} + {answer:,} tokens, {journal.spent:.4f} spent at most")
    return counts


def _open(model: GeneratorConfig, config: SynthesizeConfig) -> Generator:
    if model.base_url:
        return Endpoint(model, config.generate)
    from nemo_embed_core.synthesize.local import LocalGenerator  # torch: only where it is asked for

    return LocalGenerator(model)


def seed_documents(config: SynthesizeConfig, log: Log) -> list[tuple[str, str]]:
    """(id, text) of the chunks of documents that are not held out, below their title and heading."""
    found: list[tuple[str, str]] = []
    limits = config.self_pairs
    for document in read_documents(config.documents, log):
        if is_held_out(document.id, limits.held_out, config.seed):
            continue
        number = 0
        for section in document.parsed.sections:
            for blocks in chunks(section, limits.max_chars):
                text, number = "\n\n".join(blocks), number + 1
                if len(text) >= limits.min_chars:
                    head = ": ".join(filter(None, (document.parsed.title, *section.headings[-1:])))
                    found.append((f"{document.id}#{number - 1}", f"{head}\n\n{text}" if head else text))
    return found


def _requests(place: int, config: SynthesizeConfig, seeds: list[tuple[str, str]]) -> Iterator[Request]:
    """Those of one generator, in the order of the plan."""
    for item in plan(config.generate, config.seed, len(seeds)):
        if item.model == place:
            yield _request(item, config, seeds)


def _request(item: Item, config: SynthesizeConfig, seeds: list[tuple[str, str]]) -> Request:
    prompt = prompt_of(item, seeds[item.document][1] if item.document >= 0 else "")
    return _send(str(item.index), config.generate.models[item.model], prompt, config)


def _send(key: str, model: GeneratorConfig, prompt: str, config: SynthesizeConfig) -> Request:
    seed = int.from_bytes(hashlib.sha256(f"{config.seed}\0{key}".encode()).digest()[:4]) >> 1
    parameters = {"temperature": config.generate.temperature, "seed": seed}
    return Request(
        key, model.name, prompt, parameters | {model.length_field: config.generate.max_output_tokens}
    )


def _rows(
    config: SynthesizeConfig,
    seeds: list[tuple[str, str]],
    journal: Journal,
    failed: dict[str, str],
    verdicts: Verdicts,
) -> dict[str, list[Made]]:
    """Rows by task, in the order of the plan, whatever order the replies came in."""
    made: dict[str, list[Made]] = {}
    for item in plan(config.generate, config.seed, len(seeds)):
        request, name = _request(item, config, seeds), config.generate.models[item.model].name
        if not journal.has(request.key, request.digest):
            why = failed.get(request.key)
            verdicts.add(item, name, "not asked" if why is None else "no answer", why or "")
            continue
        key, document = seeds[item.document] if item.document >= 0 else ("", "")
        try:
            row = row_of(item, journal.get(request.key).body, document)
        except Rejected as error:
            verdicts.add(item, name, error.reason, error.detail)
            continue
        row = row._replace(pos_ids=[key]) if key else row
        made.setdefault(item.task.name, []).append(Made(item, request.digest, row))
    return made


def _compared(
    made: dict[str, list[Made]], seeds: list[tuple[str, str]], config: SynthesizeConfig, verdicts: Verdicts
) -> dict[str, list[Made]]:
    """Without duplicates, and without rows that the embedder does not find."""
    kept = {}
    for name, rows in made.items():
        copies = {place: f"of request {rows[other].item.index}" for place, other in duplicates(rows).items()}
        kept[name] = _without(copies, rows, "duplicate", config, verdicts)
        kind = rows[0].item.task.kind
        if config.generate.embedder and kept[name] and kind in ("retrieval", "document", "multi-hop"):
            corpus = [text for _, text in seeds] if kind == "document" else []
            missed = dict.fromkeys(not_found(kept[name], corpus, config.generate), "")
            kept[name] = _without(missed, kept[name], "not found", config, verdicts)
    return kept


def _without(
    details: dict[int, str], rows: list[Made], reason: str, config: SynthesizeConfig, verdicts: Verdicts
) -> list[Made]:
    """details: by the place of what goes."""
    for place, detail in sorted(details.items()):
        item = rows[place].item
        verdicts.add(item, config.generate.models[item.model].name, reason, detail)
    return [one for place, one in enumerate(rows) if place not in details]


def _judged(
    made: dict[str, list[Made]],
    judge: GeneratorConfig,
    config: SynthesizeConfig,
    journal: Journal,
    verdicts: Verdicts,
    log: Log,
) -> dict[str, list[Made]]:
    """Without rows whose positive is graded below judge_grade, or a negative not below it; where the judge
    gives no grade the row goes too. Of multi-hop rows, whose positives are half an answer each, the
    negatives are judged alone."""
    wanted: dict[str, tuple[Request, bool]] = {}  # key -> (request, whether its document is a positive)
    for one in (one for rows in made.values() for one in rows):
        row, task = one.row, one.item.task
        if task.kind not in ("retrieval", "document", "multi-hop"):
            continue
        sides = [("p", text) for text in row.pos if task.kind != "multi-hop"]
        sides += [("n", text) for text in row.neg]
        for side, text in sides:
            prompt = JUDGE.format(instruction=task.instruction, query=row.query, document=text)
            key = f"judge-{one.item.index}-{side}"
            wanted[key] = _send(key, judge, prompt, config), side == "p"
    requests = iter([request for request, _ in wanted.values()])
    asyncio.run(ask([requests], [_open(judge, config)], journal, config.generate, log))
    refused = set()
    for key, (request, is_positive) in wanted.items():
        grade = _grade(journal, request)
        if grade is None or (grade >= config.generate.judge_grade) != is_positive:
            refused.add(int(key.split("-")[1]))
    return {
        name: _without(
            {place: "" for place, one in enumerate(rows) if one.item.index in refused},
            rows,
            "judge",
            config,
            verdicts,
        )
        for name, rows in made.items()
    }


def _grade(journal: Journal, request: Request) -> float | None:
    if not journal.has(request.key, request.digest):
        return None
    try:
        return check_number(json_object(content(journal.get(request.key).body)).get("grade"), "grade")
    except (Rejected, ValueError):
        return None
