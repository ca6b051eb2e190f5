"""What a generator is asked for: a task for each use of an embedder, with its instruction and its prompt.

ask(item, document) -> the text of a request, which asks for one JSON object with FIELDS[task.kind]

Every prompt is our own. Two ways to retrieval data: a whole triple out of nothing but the plan's draws
(retrieval, multi-hop), and a query for a document that is there (document), whose negatives are mined.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from nemo_embed_core.synthesize.languages import LANGUAGES

Kind = Literal["retrieval", "document", "multi-hop", "classification", "sts", "translation"]


@dataclass(frozen=True)
class Task:
    """instruction: of the queries, and document_instruction of the documents, as training puts them before
    each.  query, document: what a text of that side is, in the words of the prompt.  labels: of a
    classification."""

    name: str
    kind: Kind
    instruction: str
    query: str = ""
    document: str = ""
    labels: tuple[str, ...] = ()
    document_instruction: str = ""


_ANSWER = "Given a question, retrieve documents that answer it"
_SIMILAR, _PARALLEL = "Retrieve semantically similar text", "Retrieve parallel sentences"
TASKS = {
    task.name: task
    for task in (
        Task("question", "retrieval", _ANSWER, "a question", "a text that answers it"),
        Task("claim", "retrieval", "Given a claim, retrieve documents that confirm or refute it", "a claim",
             "a text with the evidence for or against it"),
        Task("keywords", "retrieval", "Given keywords, retrieve articles on them",
             "keywords as typed into a search box, not a sentence", "an article on them"),
        Task("problem", "retrieval", "Given a description of a problem, retrieve posts that solve it",
             "a person's description of a problem", "a post with its solution"),
        Task("description", "retrieval", "Given a description of a thing, retrieve the article on that thing",
             "a description of a thing that does not name it", "an encyclopedic article on that thing"),
        Task("document-question", "document", _ANSWER, "a question that the document answers"),
        Task("document-keywords", "document", "Given keywords, retrieve articles on them",
             "keywords as typed into a search box by someone who looks for this document"),
        Task("multi-hop", "multi-hop", "Given a question, retrieve all documents that its answer needs",
             "a question that can only be answered by someone who reads both texts"),
        Task("sentiment", "classification", "Classify the sentiment of the review",
             "a review of a product, a place or a service", "sentiment",
             ("very negative", "negative", "mixed", "positive", "very positive")),
        Task("topic", "classification", "Classify the topic of the text",
             "the beginning of a news article", "topic",
             ("politics", "business", "science", "technology", "health", "sport", "culture", "travel",
              "education", "law")),
        Task("intent", "classification", "Classify the intent of the customer's message",
             "a message to a shop's customer service", "intent",
             ("cancel an order", "track a delivery", "return a product", "ask for a refund",
              "change an address", "report a defect", "ask about a price", "praise the service")),
        Task("similarity", "sts", _SIMILAR, document_instruction=_SIMILAR),
        Task("translation", "translation", _PARALLEL, document_instruction=_PARALLEL),
    )
}  # fmt: skip

FIELDS: dict[Kind, tuple[str, ...]] = {
    "retrieval": ("query", "positive", "hard_negative"),
    "document": ("query",),
    "multi-hop": ("query", "first", "second", "hard_negative"),
    "classification": ("text", "label"),
    "sts": ("first", "second", "grade"),
    "translation": ("text", "translation"),
}
GRADES = (
    "about unrelated things",
    "on the same topic and otherwise different",
    "different, with some details in common",
    "roughly the same, with an important difference",
    "almost the same, with unimportant differences",
    "the same in meaning, in other words",
)
PERSONAS = (
    "a nurse on night shift", "a retired engineer", "a student before an examination", "a farmer", "a lawyer",
    "a parent of small children", "a software developer", "a tourist", "a historian", "a small shop's owner",
    "a journalist", "a chemist", "a football coach", "a cook", "a civil servant", "a musician", "a pilot",
    "an insurance clerk", "a teacher at a primary school", "a carpenter", "a librarian",
    "a beginner at chess",
    "an amateur astronomer", "a patient with a new diagnosis", "a buyer of a used car", "a gardener",
)  # fmt: skip
TOPICS = (
    "household appliances", "the history of a city", "tax rules", "infectious diseases", "birds", "bridges",
    "a programming language", "contracts of employment", "electric cars", "medieval trade", "nutrition",
    "weather and climate", "mathematics", "a musical instrument", "public transport", "soil and crops",
    "computer networks", "painting", "volcanoes", "sleep", "banking", "board games", "ships", "dentistry",
    "textiles", "elections", "satellites", "fermentation", "grammar", "insurance", "mountain hiking",
    "renovating a house", "databases", "marine animals", "film", "pensions", "metallurgy", "photography",
    "first aid", "urban planning",
)  # fmt: skip
DIFFICULTIES = (
    "that a child understands",
    "that an adult without special knowledge understands",
    "that takes knowledge of the subject",
)
CLARITIES = ("exact", "a little vague", "that leaves much to be guessed")


@dataclass(frozen=True, slots=True)
class Item:
    """One request of the plan. document: the number of its seed document, -1: none."""

    index: int
    task: Task
    model: int
    language: str
    other_language: str = ""  # of a translation
    persona: str = ""
    topic: str = ""
    query_words: tuple[int, int] = (0, 0)
    document_words: tuple[int, int] = (0, 0)
    difficulty: str = ""
    clarity: str = ""
    label: str = ""
    grade: int = -1
    document: int = -1


def ask(item: Item, document: str = "") -> str:
    task, words = item.task, _words(item.query_words, item.language)
    who = f"Write for {item.persona}. The subject is {item.topic}: choose something particular in it."
    texts = f"Each text is self-contained and has {_words(item.document_words, item.language)}."
    others = ", ".join(label for label in task.labels if label != item.label)
    about = {
        "retrieval": f"""Write an example for training a search engine: `query`, {task.query};
`positive`, {task.document}; `hard_negative`, a text that a search engine could take for it,
as it has the subject and many words in common, but that is of no use for this query. {who}
The query has {words}, is {item.clarity}, and of a kind {item.difficulty};
it copies no phrase of the texts. {texts}""",
        "document": f"""Read the document between the lines of equal signs, and write `query`: {task.query}.
It is typed by {item.persona}. It has {words}, is {item.clarity}, makes sense to someone who has not seen the
document, does not speak of "the document" or "the text" and copies no phrase of it.
=====
{document}
=====""",
        "multi-hop": f"""Write `first` and `second`, two texts on different things that have one thing in
common, `query`, {task.query}, and `hard_negative`, a text with many words in common with
the query that is of no use for it. {who}
The query has {words}, and is of a kind {item.difficulty}. {texts}""",
        "classification": f"""Write `text`, {task.query}, whose {task.document} is "{item.label}"
and none of: {others}. Write as {item.persona} would, and let the subject be {item.topic}.
It has {words} and does not contain the words "{item.label}". `label` is "{item.label}".""",
        "sts": f"""Write two sentences, `first` and `second`, that are {GRADES[item.grade]}, and as
`grade` the number from 0 (unrelated) to 5 (the same in meaning) that says how similar they are:
here {item.grade}. {who}
Each has {words}. They do not have the same words in the same order.""",
        "translation": f"""\
Write `text`, in {item.language}, and `translation`, the same in {item.other_language}:
complete, idiomatic, adding nothing. {who} `text` has {words}.""",
    }[task.kind]
    fields = json.dumps({name: 0 if name == "grade" else "..." for name in FIELDS[task.kind]})
    language = "" if task.kind == "translation" else f"All texts are in {item.language}. "
    if task.kind == "classification" and item.language != "English":
        language += "`label` stays as it stands here. "
    return f"{about}\n{language}Answer with one JSON object and nothing else: {fields}"


def _words(count: tuple[int, int], language: str) -> str:
    low, high = count
    unit = "characters" if LANGUAGES[language].per_word > 1 else "words"
    low, high = (round(number * LANGUAGES[language].per_word) for number in (low, high))
    return f"{low} to {high} {unit}"


JUDGE = """Does the document help someone who searches with the query?
Instruction: {instruction}
Query: {query}
=====
{document}
=====
Answer with one JSON object and nothing else: {{"grade": 0}}, with a whole number from 0 (not at all) to 5
(it is all that is asked for)."""
