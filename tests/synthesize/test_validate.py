"""Answers of every task, right and wrong in one thing: the row, or the reason why there is none."""

import json
from dataclasses import replace
from typing import Any

import pytest

from nemo_embed_core.synthesize.tasks import TASKS, Item
from nemo_embed_core.synthesize.validate import REASONS, Rejected, row_of

QUERY = "Which animals dig the deepest burrows of all?"
POSITIVE = (
    "Badgers and wombats are known for the depth of their tunnels, which reach several metres into the soil."
)
NEGATIVE = (
    "The burrows that foxes live in were often made by other animals, and the fox moves in for the winter."
)
OTHER = "A wombat is a marsupial of Australia whose pouch opens to the back, so that no earth gets in."
DOCUMENT = f"Mammals of the soil\n\n{POSITIVE}"
ITEM = Item(3, TASKS["question"], 0, "English", query_words=(6, 14), document_words=(15, 30))
STS = replace(ITEM, task=TASKS["similarity"], grade=3)
TOPIC = replace(ITEM, task=TASKS["topic"], label="sport")
SEED = replace(ITEM, task=TASKS["document-question"])
HOPS = replace(ITEM, task=TASKS["multi-hop"])
BITEXT = replace(ITEM, task=TASKS["translation"], other_language="German")
GERMAN = "Welche Tiere graben die tiefsten Baue und wie alt werden sie?"
GOOD: dict[str, tuple[Item, dict[str, Any]]] = {
    "retrieval": (ITEM, {"query": QUERY, "positive": POSITIVE, "hard_negative": NEGATIVE}),
    "document": (SEED, {"query": QUERY}),
    "multi-hop": (HOPS, {"query": QUERY, "first": POSITIVE, "second": OTHER, "hard_negative": NEGATIVE}),
    "sts": (STS, {"first": QUERY, "second": QUERY.replace("animals", "mammals"), "grade": 4}),
    "classification": (TOPIC, {"text": "The team from the valley won the third match.", "label": "sport"}),
    "translation": (BITEXT, {"text": QUERY, "translation": GERMAN}),
}  # fmt: skip


def body(value: Any, finish: str = "stop", **message: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return json.dumps({"choices": [{"message": {"content": text, **message}, "finish_reason": finish}]})


def reason(item: Item, answer: str) -> str:
    with pytest.raises(Rejected) as error:
        row_of(item, answer, DOCUMENT)
    assert error.value.reason in REASONS
    return error.value.reason


@pytest.mark.parametrize("kind", GOOD)
def test_a_right_answer_is_a_row(kind: str) -> None:
    item, value = GOOD[kind]
    row = row_of(item, body(value), DOCUMENT)
    assert row_of(item, body(f"<think>Hm. {{</think>\n```json\n{json.dumps(value)}\n```"), DOCUMENT) == row
    assert (row.id, row.lang) == ("r3", "en")
    want: dict[str, Any] = {
        "retrieval": (QUERY, [POSITIVE], [NEGATIVE]),
        "document": (QUERY, [DOCUMENT], []),
        "multi-hop": (QUERY, [value.get("first"), value.get("second")], [NEGATIVE]),
        "sts": (QUERY, [value.get("second")], []),
        "classification": (value.get("text"), ["sport"], [x for x in TASKS["topic"].labels if x != "sport"]),
        "translation": (QUERY, [GERMAN], []),
    }
    assert (row.query, row.pos, row.neg) == want[kind]
    assert row.grade == (4 if kind == "sts" else None) and row.group == (
        "sport" if kind == "classification" else ""
    )


@pytest.mark.parametrize(
    "kind, change, wanted",
    [
        ("retrieval", {"positive": None}, "fields"),
        ("retrieval", {"query": "  "}, "fields"),
        ("retrieval", {"query": ["a"]}, "fields"),
        ("retrieval", {"more": "x"}, "fields"),
        ("retrieval", {"query": "Which animals?"}, "length"),
        ("retrieval", {"query": QUERY + " And the others of them?" * 5}, "length"),
        ("retrieval", {"hard_negative": "Too short."}, "length"),
        ("retrieval", {"positive": POSITIVE * 4}, "length"),
        ("retrieval", {"query": GERMAN}, "language"),
        ("retrieval", {"positive": "Барсуки и вомбаты " * 8}, "language"),
        ("retrieval", {"positive": f"{POSITIVE} {QUERY}"}, "copy"),
        ("retrieval", {"query": "Who are known for the depth of their tunnels, which ones?"}, "copy"),
        ("retrieval", {"hard_negative": POSITIVE + " The"}, "copy"),
        ("retrieval", {"positive": "I'm sorry, but I can't help with that, as it is of no use."}, "refusal"),
        ("document", {"query": "What does the document say on the animals of the soil?"}, "document"),
        ("document", {"query": "Which animals are named according to this text, and why?"}, "document"),
        ("document", {"query": "Who are known for the depth of their tunnels, which ones?"}, "copy"),
        ("multi-hop", {"second": POSITIVE.upper()}, "copy"),
        ("sts", {"second": QUERY.upper() + "!"}, "copy"),
        ("sts", {"grade": 1}, "grade"),
        ("sts", {"grade": 5.1}, "grade"),
        ("sts", {"grade": "3"}, "fields"),
        ("sts", {"grade": True}, "fields"),
        ("classification", {"label": "Sports"}, "fields"),
        ("classification", {"label": "health"}, "fields"),
        ("classification", {"text": "The sport of the week is of the kind that all play."}, "document"),
        ("translation", {"translation": QUERY + " And of the others?"}, "language"),
        ("translation", {"translation": "  "}, "fields"),
    ],
)  # fmt: skip
def test_an_answer_that_is_wrong_in_one_thing_is_left_out_for_it(
    kind: str, change: dict[str, Any], wanted: str
) -> None:
    item, value = GOOD[kind]
    value = {name: text for name, text in (value | change).items() if text is not None}
    assert reason(item, body(value)) == wanted


@pytest.mark.parametrize(
    "answer, wanted",
    [
        (body("As an AI language model, I must decline."), "refusal"),
        (body("I’m sorry, but I can’t help with that."), "refusal"),
        (body("", "content_filter"), "refusal"),
        (body("", refusal="no"), "refusal"),
        (body(GOOD["document"][1], "length"), "cut"),
        (body("Here you are: a query."), "not JSON"),
        (body('{"query": "Which animals?", "query": "twice"}'), "not JSON"),
        (body("[1]"), "not JSON"),
        (body("{" * 100_000), "not JSON"),
        (body(""), "not JSON"),
        ('{"choices": []}', "not JSON"),
        ('{"error": "x"}', "not JSON"),
        ("half", "not JSON"),
    ],
)
def test_a_response_without_an_answer_is_left_out(answer: str, wanted: str) -> None:
    assert reason(SEED, answer) == wanted
