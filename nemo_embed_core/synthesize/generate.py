"""Rows that models write: planned, asked for, checked, and written as dataset folders.

generate(config, print) -> output/datasets/TASK, dataset folders; output/journal.jsonl, every answer

generate.journal puts that file elsewhere, for several outputs.

The journal is what was paid for; the folders are made of it anew by each call, and the same journal gives the
same bytes. Memory: of each request its place in the plan, its digest and its verdict; the accepted rows; the
seed documents.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from nemo_embed_core.encoders import TextEncoder

Log = Callable[[str], None]


def generate(config: SynthesizeConfig, log: Log = print) -> dict[str, dict[str, int]]:
    """What was counted, by task. UserError where nothing can be asked or no row is accepted."""
    signer()  # UserError before anything is paid
    output = Path(config.output)
    journal = Path(config.generate.journal or output / "journal.jsonl")
    with ExitStack() as held:
        for folder in dict.fromkeys((output.resolve(), journal.parent.resolve())):
            make_folder(folder)
            if (descriptor := hold(folder)) is None:
                raise UserError(
                    f"{folder} is in use by another process; wait until it ends or choose another output"
                )
            held.callback(os.close, descriptor)
        return _generate(config, journal, log)


def _generate(config: SynthesizeConfig, path: Path, log: Log) -> dict[str, dict[str, int]]:
    """All that a call needs is opened before the first request is paid for."""
    seeds = seed_documents(config, log) if config.documents else []
    items = list(plan(config.generate, config.seed, [text for _, text in seeds]))
    generators = [_open(model, config) for model in config.generate.models]
    judge = _open(config.generate.judge, config) if config.generate.judge is not None else None
    embedder = None
    if config.generate.embedder not in ("", "bm25"):
        from nemo_embed_core.encoders import open_encoder  # torch: only where it is asked for

        embedder = open_encoder(config.generate.embedder)
    with closing(Journal(path, log)) as journal:
        if len(journal):
            log(f"{journal.path}: {len(journal):,} replies are there, {journal.spent:.4f} spent at most")
        requests = [_requests(items, place, config, seeds) for place in range(len(generators))]
        failed = asyncio.run(ask(requests, generators, journal, config.generate, log))
        verdicts = Verdicts()
        made = _rows(items, config, seeds, journal, failed, verdicts)
        made = _compared(made, seeds, embedder, config, verdicts)
        if judge is not None:
            made = _judged(made, judge, config, journal, verdicts, log)
        return _write(made, seeds, config, journal, verdicts, log)


def _write(
    made: dict[str, list[Made]],
    seeds: list[tuple[str, str]],
    config: SynthesizeConfig,
    journal: Journal,
    verdicts: Verdicts,
    log: Log,
) -> dict[str, dict[str, int]]:
    for rows in made.values():
        for one in rows:
            verdicts.add(one.item, one.digest, config.generate.models[one.item.model].name, "accepted")
    log_table(verdicts, log)
    made = {name: rows for name, rows in made.items() if rows}
    if not made:
        raise UserError(
            f"none of {len(journal):,} replies is accepted; {journal.path} has them, the lines above say why"
        )
    report = {"spent": journal.spent, "tokens": journal.tokens, "replies": len(journal)}
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
    for document in read_documents(config.documents, log, config.max_documents, config.seed):
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


def _requests(
    items: list[Item], place: int, config: SynthesizeConfig, seeds: list[tuple[str, str]]
) -> Iterator[Request]:
    """Those of one generator, in the order of the plan."""
    return (_request(item, config, seeds) for item in items if item.model == place)


def _request(item: Item, config: SynthesizeConfig, seeds: list[tuple[str, str]]) -> Request:
    prompt = prompt_of(item, seeds[item.document][1] if item.document >= 0 else "")
    return _send(config.generate.models[item.model], prompt, config, str(item.index))


def _send(model: GeneratorConfig, prompt: str, config: SynthesizeConfig, draw: str) -> Request:
    """draw: two requests of one prompt are two where it differs."""
    seed = int.from_bytes(hashlib.sha256(f"{config.seed}\0{draw}".encode()).digest()[:4]) >> 1
    parameters = {"temperature": config.generate.temperature, "seed": seed}
    parameters[model.length_field] = config.generate.max_output_tokens
    return Request(model.name, prompt, parameters)


def _unanswered(digest: str, failed: dict[str, str]) -> tuple[str, str]:
    """(verdict, detail) of a request that the journal has no reply of."""
    return ("no answer", failed[digest]) if digest in failed else ("not asked", "")


def _rows(
    items: list[Item],
    config: SynthesizeConfig,
    seeds: list[tuple[str, str]],
    journal: Journal,
    failed: dict[str, str],
    verdicts: Verdicts,
) -> dict[str, list[Made]]:
    """Rows by task, in the order of the plan, whatever order the replies came in."""
    made: dict[str, list[Made]] = {}
    for item in items:
        digest, name = _request(item, config, seeds).digest, config.generate.models[item.model].name
        if not journal.has(digest):
            verdicts.add(item, digest, name, *_unanswered(digest, failed))
            continue
        key, document = seeds[item.document] if item.document >= 0 else ("", "")
        try:
            row = row_of(item, journal.get(digest).body, document)
        except Rejected as error:
            verdicts.add(item, digest, name, error.reason, error.detail)
            continue
        row = row._replace(pos_ids=[key]) if key else row
        made.setdefault(item.task.name, []).append(Made(item, digest, row))
    return made


def _compared(
    made: dict[str, list[Made]],
    seeds: list[tuple[str, str]],
    embedder: TextEncoder | None,
    config: SynthesizeConfig,
    verdicts: Verdicts,
) -> dict[str, list[Made]]:
    """Without duplicates, and without rows that the embedder does not find."""
    kept = {}
    for name, rows in made.items():
        copies = {
            place: ("duplicate", f"of request {rows[other].item.index}")
            for place, other in duplicates(rows).items()
        }
        kept[name] = _without(copies, rows, config, verdicts)
        kind = rows[0].item.task.kind
        if config.generate.embedder and kept[name] and kind in ("retrieval", "document", "multi-hop"):
            corpus = [text for _, text in seeds] if kind == "document" else []
            missed = not_found(kept[name], corpus, embedder, config.generate.top_k)
            kept[name] = _without(dict.fromkeys(missed, ("not found", "")), kept[name], config, verdicts)
    return kept


def _without(
    verdict_of: dict[int, tuple[str, str]], rows: list[Made], config: SynthesizeConfig, verdicts: Verdicts
) -> list[Made]:
    """verdict_of: (verdict, detail) by the place of a row that goes."""
    for place, (verdict, detail) in sorted(verdict_of.items()):
        one = rows[place]
        verdicts.add(one.item, one.digest, config.generate.models[one.item.model].name, verdict, detail)
    return [one for place, one in enumerate(rows) if place not in verdict_of]


def _judged(
    made: dict[str, list[Made]],
    judge: Generator,
    config: SynthesizeConfig,
    journal: Journal,
    verdicts: Verdicts,
    log: Log,
) -> dict[str, list[Made]]:
    """Without rows whose positive is graded below judge_grade, or a negative not below it; where the judge
    gives no grade the row goes too. Of multi-hop rows, whose positives are half an answer each, the
    negatives are judged alone."""
    requests: dict[str, Request] = {}
    looks: dict[int, list[tuple[str, bool]]] = {}  # of a row's request (digest, whether of a positive)
    for one in (one for rows in made.values() for one in rows):
        row, task = one.row, one.item.task
        if task.kind not in ("retrieval", "document", "multi-hop"):
            continue
        sides = [(text, True) for text in row.pos if task.kind != "multi-hop"]
        for text, is_positive in [*sides, *((text, False) for text in row.neg)]:
            prompt = JUDGE.format(instruction=task.instruction, query=row.query, document=text)
            request = _send(judge.config, prompt, config, "judge")
            requests[request.digest] = request
            looks.setdefault(one.item.index, []).append((request.digest, is_positive))
    failed = asyncio.run(ask([iter(requests.values())], [judge], journal, config.generate, log))
    kept = {}
    for name, rows in made.items():
        found = [_judgement(looks.get(one.item.index, []), journal, failed, config) for one in rows]
        verdict_of = {place: verdict for place, verdict in enumerate(found) if verdict is not None}
        kept[name] = _without(verdict_of, rows, config, verdicts)
    return kept


def _judgement(
    looks: list[tuple[str, bool]], journal: Journal, failed: dict[str, str], config: SynthesizeConfig
) -> tuple[str, str] | None:
    """(verdict, detail) of a row that goes. One bad grade is enough; else all have to be there."""
    open_looks = []
    for digest, is_positive in looks:
        if not journal.has(digest):
            open_looks.append(digest)
            continue
        grade = _grade(journal, digest)
        if grade is None or (grade >= config.generate.judge_grade) != is_positive:
            return "judge", ""
    return _unanswered(open_looks[0], failed) if open_looks else None


def _grade(journal: Journal, digest: str) -> float | None:
    try:
        return check_number(json_object(content(journal.get(digest).body)).get("grade"), "grade")
    except (Rejected, ValueError):
        return None
