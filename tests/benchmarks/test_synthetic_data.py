"""Rows of the synthetic experiment: known texts, a query in the form of its task by its generator's rule."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

from benchmarks.synthetic_data import CODES, GENERATORS, TASKS, Writers
from nemo_embed_core.synthesize.tasks import TASKS as KNOWN
from nemo_embed_core.synthesize.tasks import Item, ask
from nemo_embed_core.synthesize.validate import row_of

LETTERS = "bcdfghklmnprstvz"


def made(index: int, language: str) -> str:
    """Eight words of its own, each after four that all texts of the language have."""
    rng = random.Random(f"{language} {index}")
    own = ["".join(rng.choices(LETTERS, k=9)) for _ in range(8)]
    usual = " ".join(f"{word}{language.lower()}" for word in ("common", "shared", "usual", "often"))
    return " ".join(f"{usual} {word}" for word in own)


TEXTS = [(language, made(i, language)) for language in CODES.values() for i in range(20)]


def written(task: str, model: str, seed: int = 3) -> tuple[dict[str, Any], Item]:
    item = Item(
        0, KNOWN[task], 0, "German", persona="a cook", topic="sleep", query_words=(6, 9),
        document_words=(30, 60), difficulty="that a child understands", clarity="exact",
    )  # fmt: skip
    server = Writers(TEXTS)
    return server._answer(ask(item), random.Random(seed), model), item


@pytest.mark.parametrize("model", GENERATORS)
@pytest.mark.parametrize("task", TASKS)
def test_an_answer_is_a_row_of_known_texts_in_the_language(task: str, model: str) -> None:
    value, item = written(task, model)
    response = {"choices": [{"message": {"content": json.dumps(value)}, "finish_reason": "stop"}]}
    row = row_of(item, json.dumps(response))
    german = [text for language, text in TEXTS if language == "German"]
    assert row.pos == [value["positive"]] and row.neg == [value["hard_negative"]]
    assert value["positive"] in german and value["hard_negative"] in german
    assert value["positive"] != value["hard_negative"]
    assert len(set(re.findall(r"\w+", value["query"])) & set(value["positive"].split())) >= 2


def test_a_task_has_its_form_and_a_generator_its_words() -> None:
    queries = {task: written(task, "rare")[0]["query"] for task in TASKS}
    assert queries["question"].startswith("Was gibt es für") and queries["problem"].startswith(
        "Ich habe Ärger"
    )
    assert queries["claim"].startswith("Bekannt") and queries["description"].startswith("Es hat mit")
    value, _ = written("keywords", "first")
    words = list(dict.fromkeys(value["positive"].split()))
    assert set(value["query"].split()) == set(words[: len(value["query"].split())])
    rare, _ = written("keywords", "rare")
    assert not any("german" in word for word in rare["query"].split())  # its own words alone
    last, _ = written("keywords", "last")
    assert set(last["query"].split()) < set(list(dict.fromkeys(last["positive"].split()))[4:])
