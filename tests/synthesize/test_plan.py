"""The plan: which request is which, whatever else is asked for; languages and prompts."""

from collections import Counter
from dataclasses import replace
from typing import Any, get_args

import pytest

from nemo_embed_core.config import GenerateConfig, GeneratorConfig
from nemo_embed_core.config.synthesize import LanguageName, TaskName
from nemo_embed_core.errors import UserError
from nemo_embed_core.synthesize.languages import LANGUAGES, is_in
from nemo_embed_core.synthesize.plan import plan
from nemo_embed_core.synthesize.tasks import TASKS, ask

LARGE, SMALL = GeneratorConfig(name="large"), GeneratorConfig(name="small", weight=3.0)


DOCUMENTS = [f"The text of document {i}." for i in range(9)]


def items(seed: int = 7, documents: list[str] = DOCUMENTS, **options: Any) -> list[Any]:
    options = {"models": [LARGE, SMALL], "languages": ["English", "Chinese"], "requests": 400} | options
    return list(plan(GenerateConfig(**options), seed, documents))


def test_names_of_tasks_and_languages_are_those_of_the_options() -> None:
    assert set(TASKS) == set(get_args(TaskName)) and set(LANGUAGES) == set(get_args(LanguageName))


def test_a_request_is_the_same_however_many_there_are_and_another_with_another_seed() -> None:
    assert items()[:100] == items(requests=100)
    assert sum(a == b for a, b in zip(items(), items(seed=8), strict=True)) < 5


def test_tasks_and_generators_are_drawn_apart() -> None:
    ours, other_models = items(), items(models=[LARGE])
    assert [replace(item, model=0) for item in ours] == other_models
    alone = items(tasks={"question": 1.0})
    assert {item.task.name for item in alone} == {"question"}
    assert [(item.model, item.persona, item.topic) for item in alone] == [
        (item.model, item.persona, item.topic) for item in ours
    ]


def test_draws_have_their_weights() -> None:
    found = items(tasks={"question": 3.0, "similarity": 1.0}, requests=4000)
    counts = Counter(item.task.name for item in found)
    assert 0.72 < counts["question"] / 4000 < 0.78
    assert 0.72 < sum(item.model for item in found) / 4000 < 0.78
    grades = Counter(item.grade for item in found if item.task.name == "similarity")
    assert set(grades) == set(range(6)) and min(grades.values()) > 100
    documents = Counter(item.document for item in items(tasks={"document-question": 1.0}, requests=900))
    assert set(documents) == set(range(9)) and 70 < min(documents.values()) < max(documents.values()) < 130


def test_a_document_that_is_added_takes_its_share_and_one_that_moves_none() -> None:
    tasks = {"document-question": 1.0}
    before = [DOCUMENTS[item.document] for item in items(tasks=tasks)]
    moved = [*reversed(DOCUMENTS[:4]), "A new one.", *DOCUMENTS[4:]]
    after = [moved[item.document] for item in items(documents=moved, tasks=tasks)]
    new = [text for text in after if text == "A new one."]
    assert 20 < len(new) < 65  # of 400
    assert all(text in (other, "A new one.") for text, other in zip(after, before, strict=True))


def test_only_tasks_that_can_be_asked_for() -> None:
    names = {item.task.name for item in items(documents=[], languages=["English"])}
    assert names == set(TASKS) - {"document-question", "document-keywords", "translation"}
    with pytest.raises(UserError, match="document-question needs documents"):
        items(documents=[], tasks={"document-question": 1.0})
    with pytest.raises(UserError, match="translation needs two languages"):
        items(languages=["English"], tasks={"translation": 1.0})


def test_a_prompt_says_all_that_was_drawn() -> None:
    seen = set()
    for item in items():
        text = ask(item, "The very document.")
        assert item.persona in text and "{" not in text.splitlines()[-1].split("nothing else: ")[0]
        if item.language == "Chinese" and item.task.kind != "translation":
            assert "characters" in text and "All texts are in Chinese." in text
        assert ("The very document." in text) == (item.task.kind == "document")
        assert item.grade < 0 or f"here {item.grade}." in text
        assert not item.label or f'"{item.label}"' in text
        assert not item.other_language or f"the same in {item.other_language}" in text
        seen.add(item.task.name)
    assert seen == set(TASKS)


@pytest.mark.parametrize(
    "text, language",
    [
        ("Which of the birds are seen in this garden?", "English"),
        ("Wie alt wird ein Dachs und was frisst er?", "German"),
        ("Quelle est la taille des arbres dans la forêt ?", "French"),
        ("¿Cómo se llama el río más largo de los Andes?", "Spanish"),
        ("Hoe oud wordt een das en wat eet hij?", "Dutch"),
        ("Сколько лет живёт барсук и что он ест?", "Russian"),
        ("Скільки років живе борсук і що він їсть?", "Ukrainian"),
        ("獾能活多少年？它吃什么东西？", "Chinese"),
        ("アナグマは何年生きますか？", "Japanese"),
        ("오소리는 몇 년을 사나요?", "Korean"),
    ],
)
def test_a_text_is_in_its_own_language_and_in_no_other(text: str, language: str) -> None:
    assert [name for name in LANGUAGES if is_in(text, name)] == [language]


def test_a_text_without_common_words_passes_for_each_language_of_its_script() -> None:
    assert (
        is_in("badger diet", "English") and is_in("badger diet", "German") and not is_in("badger", "Russian")
    )
