"""Is an answer what was asked for? Rows, or the reason why not.

rows_of(item, reply.body, document) -> Row; Rejected("language", "positive is no German")

REASONS has each with what it means; `python -m benchmarks.synthesis` plants a fault of each kind and counts.
"""

from __future__ import annotations

import re
from typing import Any

from nemo_embed_core.data.formats.row import Row, check_number, check_string
from nemo_embed_core.data.near import NEAR, similarity
from nemo_embed_core.data.normal_form import has_content, normal_form
from nemo_embed_core.files.strict_json import parse
from nemo_embed_core.synthesize.languages import LANGUAGES, is_in, num_words
from nemo_embed_core.synthesize.tasks import FIELDS, Item

REASONS = {
    "no answer": "the request failed as often as it may",
    "cut": "the answer reached its longest length",
    "refusal": "the model declines, or its filter did",
    "not JSON": "no JSON object, also without code fences around it",
    "fields": "a field is missing, unknown, empty or of another type; a label that was not asked for",
    "length": "less than half or more than twice as long as was asked for",
    "language": "another language than was asked for",
    "copy": "the query or one text is taken from another one; two sentences are the same",
    "document": "the query speaks of the document, which nobody sees who searches; a text names its label",
    "grade": "more than 1 away from the grade that was asked for",
    "duplicate": "the same query or text as in an earlier row, or nearly",
    "not found": "its document is not among the top_k that the embedder finds",
    "judge": "the judge finds the document of no use, or the negative as useful",
}
RUN = 8  # words in a row that a query may not have from its document
_REFUSAL = re.compile(
    r"\b(i(['’]m| am) (sorry|unable|not able)|i (cannot|can['’]t|won['’]t) "
    r"(help|assist|provide|comply|write|create|do)|as an ai\b"
    r"|as a (large )?language model|i must decline|against my (guidelines|policy))",
    re.I,
)
_MENTION = re.compile(
    r"\b(according to|in|from|of|by|does|the author of) (the|this) (above |given |provided )?"
    r"(document|text|passage|article|excerpt)\b|\bthe (document|passage|excerpt)\b",
    re.I,
)
_FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.S)


class Rejected(Exception):
    """reason: of REASONS."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        assert reason in REASONS
        self.reason, self.detail = reason, detail


def content(body: str) -> str:
    """The text of a response of the protocol, whole and not declined."""
    try:
        choice = parse(body)["choices"][0]
        message, ends = choice["message"], choice.get("finish_reason")
        text = message.get("content")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise Rejected("not JSON", "the response has no choices[0].message") from None
    if ends == "content_filter" or message.get("refusal"):
        raise Rejected("refusal", "by the endpoint")
    if ends == "length":
        raise Rejected("cut")
    if not isinstance(text, str) or not has_content(text):
        raise Rejected("not JSON", "the answer is empty")
    return text


def json_object(text: str) -> dict[str, Any]:
    """What a model answered, also in a code fence."""
    text = text.rpartition("</think>")[2].strip()
    fenced = _FENCE.fullmatch(text)
    try:
        value = parse(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        raise Rejected("refusal" if _REFUSAL.search(text[:300]) else "not JSON", text[:80]) from None
    if not isinstance(value, dict):
        raise Rejected("not JSON", f"a JSON {type(value).__name__}")
    return value


def row_of(item: Item, body: str, document: str = "") -> Row:
    """The row of a reply, whose texts pass every check that needs nothing but them."""
    value, task = json_object(content(body)), item.task
    texts = _fields(value, item)
    if task.kind == "sts":
        _check_words(texts, ("first", "second"), item.query_words, item.language)
        grade = check_number(value["grade"], "grade")
        if normal_form(texts["first"]) == normal_form(texts["second"]):
            raise Rejected("copy", "first is second")
        if not 0 <= grade <= 5 or abs(grade - item.grade) > 1:
            raise Rejected("grade", f"{grade:g} for {item.grade}")
        return _row(item, texts["first"], [texts["second"]], [])._replace(grade=grade)
    if task.kind == "translation":
        _check_words(texts, ("text",), item.query_words, item.language)
        _check_language({"translation": texts["translation"]}, item.other_language)
        if normal_form(texts["text"]) == normal_form(texts["translation"]):
            raise Rejected("copy", "the translation is the text")
        return _row(item, texts["text"], [texts["translation"]], [])
    if task.kind == "classification":
        _check_words({"text": texts["text"]}, ("text",), item.query_words, item.language)
        if normal_form(item.label) in normal_form(texts["text"]):
            raise Rejected("document", f"names its label {item.label!r}")
        others = [label for label in task.labels if label != item.label]
        return _row(item, texts["text"], [item.label], others)._replace(group=item.label)
    _check_words(texts, ("query",), item.query_words, item.language)
    if _MENTION.search(texts["query"]):
        raise Rejected("document", texts["query"][:80])
    if task.kind == "document":
        _check_copy(texts["query"], document)
        return _row(item, texts["query"], [document], [])
    positives = [texts[name] for name in ("positive", "first", "second") if name in texts]
    long = [name for name in texts if name != "query"]
    _check_words(texts, long, item.document_words, item.language)
    for positive in positives:
        _check_copy(texts["query"], positive)
    documents = [*positives, texts["hard_negative"]]
    for i, one in enumerate(documents):
        for other in documents[:i]:
            if similarity(one, other) >= NEAR:
                raise Rejected("copy", "two documents are the same")
    return _row(item, texts["query"], positives, [texts["hard_negative"]])


def _row(item: Item, query: str, pos: list[str], neg: list[str]) -> Row:
    code = LANGUAGES[item.language].code
    return Row(query, pos, neg, f"request {item.index}", 1, lang=code, id=f"r{item.index}")


def _fields(value: dict[str, Any], item: Item) -> dict[str, str]:
    names = FIELDS[item.task.kind]
    if set(value) != set(names):
        raise Rejected("fields", f"{sorted(value)} in place of {sorted(names)}"[:120])
    texts: dict[str, str] = {}
    for name in names:
        try:
            if name == "grade":
                check_number(value[name], name)
                continue
            texts[name] = check_string(value[name], name, "a text").strip()
        except ValueError as error:
            raise Rejected("fields", str(error)) from None
        if not has_content(texts[name]):
            raise Rejected("fields", f"{name} is empty")
        if _REFUSAL.match(texts[name]):
            raise Rejected("refusal", texts[name][:80])
    if item.task.kind == "classification" and texts["label"] != item.label:
        raise Rejected("fields", f"label {texts['label'][:40]!r} for {item.label!r}")
    return texts


def _check_words(texts: dict[str, str], names: Any, bounds: tuple[int, int], language: str) -> None:
    for name in names:
        count = num_words(texts[name], language)
        if not bounds[0] / 2 <= count <= bounds[1] * 2:
            raise Rejected("length", f"{name} has {count:.0f} words for {bounds[0]} to {bounds[1]}")
    _check_language({name: texts[name] for name in names}, language)


def _check_language(texts: dict[str, str], language: str) -> None:
    for name, text in texts.items():
        if not is_in(text, language):
            raise Rejected("language", f"{name} is no {language}: {text[:60]}")


def _check_copy(query: str, document: str) -> None:
    """Rejected where the document has the query, or RUN words of it in a row."""
    words, whole = normal_form(query).split(), f" {' '.join(normal_form(document).split())} "
    count = min(RUN, max(4, len(words)))
    for start in range(len(words) - count + 1):
        if f" {' '.join(words[start : start + count])} " in whole:
            raise Rejected("copy", " ".join(words[start : start + count]))
