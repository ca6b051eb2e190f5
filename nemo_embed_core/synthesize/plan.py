"""Which requests are made: a pure function of the seed, so that request i is the same whenever it is asked.

Of each request the task, the generator and the rest (language, persona, topic, lengths, difficulty, clarity,
label, grade) are drawn from streams of their own: another mix of tasks or of generators changes no other
draw, which is what an experiment on the diversity of either needs. Its seed document is the one whose text's
hash, mixed with a draw, is the greatest: a document that is added takes over its own share of the requests,
and one that is renamed or moved none, so that all others are what they were, and paid for.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence

import numpy as np

from nemo_embed_core.config.synthesize import GenerateConfig
from nemo_embed_core.data.sampler import splitmix64
from nemo_embed_core.errors import UserError
from nemo_embed_core.synthesize.tasks import CLARITIES, DIFFICULTIES, PERSONAS, TASKS, TOPICS, Item, Task

QUERY_WORDS = ((4, 8), (6, 14), (12, 30))
DOCUMENT_WORDS = ((40, 80), (80, 160), (150, 300))
SENTENCE_WORDS = ((6, 12), (10, 20), (18, 35))
KEYWORDS = (2, 6)


def plan(config: GenerateConfig, seed: int, documents: Sequence[str]) -> Iterator[Item]:
    """documents: texts that may be seeds. UserError where a task needs some and there are none."""
    tasks = {TASKS[name]: weight for name, weight in tasks_of(config, len(documents)).items()}
    keys_N = np.array([_hash(text) for text in documents], np.uint64)
    for index in range(config.requests):
        yield _draw(index, tasks, config, seed, keys_N)


def tasks_of(config: GenerateConfig, num_documents: int) -> dict[str, float]:
    """{name: weight}; without tasks in the config all that can be asked for, alike."""
    usual = {name: 1.0 for name, task in TASKS.items() if _is_possible(task, config, num_documents)}
    tasks = config.tasks or usual
    for name in tasks:
        if not _is_possible(TASKS[name], config, num_documents):
            why = "documents" if TASKS[name].kind == "document" else "two languages: generate.languages"
            raise UserError(f"generate.tasks: {name} needs {why}; give them or leave the task out")
    return dict(tasks)


def _is_possible(task: Task, config: GenerateConfig, num_documents: int) -> bool:
    if task.kind == "translation":
        return len(config.languages) > 1
    return num_documents > 0 or task.kind != "document"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _stream(seed: int, name: str, index: int) -> random.Random:
    # Of the digest: Random(str) hashes as well, but only by a rule of this Python.
    return random.Random(int.from_bytes(hashlib.sha256(f"{seed}\0{name}\0{index}".encode()).digest()))


def _draw(
    index: int, tasks: dict[Task, float], config: GenerateConfig, seed: int, keys_N: np.ndarray
) -> Item:
    (task,) = _stream(seed, "task", index).choices(list(tasks), list(tasks.values()))
    weights = [model.weight for model in config.models]
    (model,) = _stream(seed, "model", index).choices(range(len(weights)), weights)
    rest = _stream(seed, "rest", index)
    language = rest.choice(config.languages)
    others = [name for name in config.languages if name != language]
    sentences = task.kind in ("classification", "sts", "translation")
    draws = (
        rest.choice(others) if others else "",
        rest.choice(PERSONAS),
        rest.choice(TOPICS),
        rest.choice(SENTENCE_WORDS if sentences else QUERY_WORDS),
        rest.choice(DOCUMENT_WORDS),
        rest.choice(DIFFICULTIES),
        rest.choice(CLARITIES),
        rest.random(),
    )
    other, persona, topic, query_words, document_words, difficulty, clarity, share = draws
    if "keywords" in task.name:
        query_words = KEYWORDS
    return Item(
        index=index,
        task=task,
        model=model,
        language=language,
        other_language=other if task.kind == "translation" else "",
        persona=persona,
        topic=topic,
        query_words=query_words,
        document_words=document_words,
        difficulty=difficulty,
        clarity=clarity,
        label=_at(task.labels, share) if task.labels else "",
        grade=int(share * 6) if task.kind == "sts" else -1,
        document=_seed_document(keys_N, seed, index) if task.kind == "document" else -1,
    )


def _seed_document(keys_N: np.ndarray, seed: int, index: int) -> int:
    """Rendezvous hashing: of N documents each is the greatest for one request in N."""
    return int(splitmix64(keys_N ^ np.uint64(_hash(f"{seed}\0document\0{index}"))).argmax())


def _at(values: Sequence[str], share: float) -> str:
    return values[int(share * len(values))]
