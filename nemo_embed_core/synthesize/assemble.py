"""Replies into dataset folders: each row checked on its own, then against the others, then written.

Order of the checks: the answer itself (validate.py), duplicates by MinHash (data/near.py), the document among
the top_k that an embedder finds, the judge. A folder for each task, as each has its own instruction.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nemo_embed_core.config.synthesize import SynthesizeConfig
from nemo_embed_core.data.dataset import Metadata
from nemo_embed_core.data.dataset_writer import write_dataset
from nemo_embed_core.data.formats.row import Row
from nemo_embed_core.data.near import NearIndex, signer
from nemo_embed_core.data.normal_form import normal_key
from nemo_embed_core.data.prepare import instruction
from nemo_embed_core.data.prompts import query_prompt
from nemo_embed_core.evaluation.bm25 import Bm25
from nemo_embed_core.files.durable import new_folder, write_bytes
from nemo_embed_core.synthesize.documents import name_of
from nemo_embed_core.synthesize.tasks import TASKS, Item

if TYPE_CHECKING:
    from nemo_embed_core.encoders import TextEncoder

MAX_LENGTH = 512  # tokens of a text that the embedder looks at
TASK_TYPES = {
    "retrieval": "Retrieval",
    "document": "Retrieval",
    "multi-hop": "Retrieval",
    "classification": "Classification",
    "sts": "STS",
    "translation": "BitextMining",
}


class Made(NamedTuple):
    """A row that stands so far, and the request that it came from."""

    item: Item
    digest: str
    row: Row


class Verdicts:
    """What became of each request: counts by task, by generator and by reason; details in a file."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, str]] = []  # (index of the request, its line)
        self.by: dict[str, dict[str, Counter[str]]] = {"task": {}, "model": {}}

    def add(self, item: Item, digest: str, model: str, verdict: str, detail: str = "") -> None:
        """digest: the request's in the journal."""
        line = {"request": item.index, "digest": digest, "task": item.task.name, "model": model}
        line |= {"verdict": verdict}
        line |= {"detail": detail} if detail else {}
        self.lines.append((item.index, json.dumps(line, ensure_ascii=False)))
        for kind, name in (("task", item.task.name), ("model", model)):
            self.by[kind].setdefault(name, Counter())[verdict] += 1

    def total(self) -> Counter[str]:
        return sum(self.by["task"].values(), Counter())


def duplicates(made: Sequence[Made]) -> dict[int, int]:
    """{place: place of the earlier row} of rows of one task whose query, or first generated document, is
    that of an earlier one, or nearly: J of data/near.py is 0.8 at least. Of graded pairs both texts are one.
    """
    kind = made[0].item.task.kind
    sides = [[f"{one.row.query}\n{one.row.pos[0]}" if kind == "sts" else one.row.query for one in made]]
    if kind in ("retrieval", "multi-hop"):
        sides.append([one.row.pos[0] for one in made])
    sign, found = signer(), dict[int, int]()
    for texts in sides:
        first: dict[bytes, int] = {}
        for place, text in enumerate(texts):
            if (other := first.setdefault(normal_key(text), place)) != place:
                found[place] = other
        places = np.array(sorted(first.values()))
        index = NearIndex(places, texts.__getitem__, sign, is_own=True)
        for start in range(0, len(texts), 512):
            part = texts[start : start + 512]
            index.show(start, part, sign(part))
        found |= {place: other for place, (other, _) in index.found.items() if other < place}
    return found


def not_found(
    made: Sequence[Made], documents: Iterable[str], encoder: TextEncoder | None, top_k: int
) -> set[int]:
    """Places of rows whose first positive is not among the top_k of all documents of the task for its query.

    Exact, by the encoder, the task's instruction before the queries, or by BM25 (None); a document that ties
    with the positive counts as before it. UserError where a vector is not finite.
    """
    texts = list(
        dict.fromkeys([*documents, *(text for one in made for text in (*one.row.pos, *one.row.neg))])
    )
    place_of = {text: place for place, text in enumerate(texts)}
    if encoder is None:
        index = Bm25(texts)
        scores: Iterator[np.ndarray] = (index.scores(one.row.query) for one in made)
    else:
        from nemo_embed_core.evaluation.encoding import Encoding  # torch: only where it is asked for

        encoding, prompt = Encoding(encoder), query_prompt(made[0].item.task.instruction)
        matrix, _ = encoding.rows(texts, "", MAX_LENGTH, "document")
        queries, _ = encoding.rows([one.row.query for one in made], prompt, MAX_LENGTH, "query")
        scores = (matrix @ query for query in queries)
    found = set()
    for place, (one, row_N) in enumerate(zip(made, scores, strict=True)):
        own = row_N[place_of[one.row.pos[0]]]
        shares_nothing = encoder is None and own == 0
        if shares_nothing or int((row_N >= own).sum()) > top_k:
            found.add(place)
    return found


def write(
    made_of: dict[str, list[Made]],
    documents: Sequence[tuple[str, str]],
    config: SynthesizeConfig,
    verdicts: Verdicts,
    report: dict[str, Any],
) -> dict[str, dict[str, int]]:
    """output/datasets/TASK, output/datasets/report.json and verdicts.jsonl, all or none: those of an earlier
    call, made of the same journal, stay until these are whole.

    documents: (id, text) of the seed documents, all of which are the corpus of the tasks that they are for.
    """
    counts: dict[str, dict[str, int]] = {}
    with new_folder(Path(config.output) / "datasets", replaces=True) as tmp:
        for name, made in made_of.items():
            rows = (one.row for one in made)
            corpus = documents if TASKS[name].kind == "document" else ()
            counts[name] = write_dataset(tmp / name, rows, _metadata(name, made, config), corpus)
        lines = "".join(f"{line}\n" for _, line in sorted(verdicts.lines))
        write_bytes(tmp / "verdicts.jsonl", lines.encode("utf-8", "backslashreplace"))
        value = {**report, "requests": dict(verdicts.total()), "by": verdicts.by, "written": counts}
        write_bytes(tmp / "report.json", (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())
    return counts


def _metadata(name: str, made: list[Made], config: SynthesizeConfig) -> Metadata:
    task, models = TASKS[name], config.generate.models
    rows = Counter(one.item.model for one in made)
    licence_of = {models[place].name: models[place].licence for place in sorted(rows)}
    if task.kind == "document":
        licence_of[name_of(config.documents)] = config.licence
    licences = dict.fromkeys(licence or f"unknown ({maker})" for maker, licence in licence_of.items())
    prompts = hashlib.sha256("".join(sorted(one.digest for one in made)).encode()).hexdigest()
    return Metadata(
        corpus_id=name,
        query_instruction=instruction(query_prompt(task.instruction)),
        passage_instruction=instruction(query_prompt(task.document_instruction)),
        task_type=TASK_TYPES[task.kind],
        source="synthetic" if task.kind != "document" else f"synthetic, for {name_of(config.documents)}",
        licence=", ".join(licences) if any(licence_of.values()) else "",
        generator={
            "models": {models[place].name: count for place, count in sorted(rows.items())},
            "prompts": prompts,
            "seed": config.seed,
        },
    )


def log_table(verdicts: Verdicts, log: Callable[[str], None]) -> None:
    """A line for each task: rows, and what was left out by reason, most first."""
    for name, counts in sorted(verdicts.by["task"].items()):
        rejected = ", ".join(
            f"{reason} {count:,}" for reason, count in counts.most_common() if reason != "accepted"
        )
        log(
            f"{name}: {counts['accepted']:,} of {counts.total():,} accepted"
            + (f"; {rejected}" * bool(rejected))
        )
