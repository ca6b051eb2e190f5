"""Models of a dozen words, folders of BEIR form and tables of texts for them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

WORDS = ["<s>", "<pad>", "<unk>", "query", ":", *(f"w{i}" for i in range(20))]


def word_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in WORDS[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return tokenizer


def copied(folder: Path, target: Path, file: str = "", **changes: Any) -> Path:
    """The folder again, a JSON file of it changed; a value of ... deletes the key."""
    shutil.copytree(folder, target)
    if file:
        value = {**json.loads((target / file).read_text()), **changes}
        (target / file).write_text(json.dumps({key: item for key, item in value.items() if item is not ...}))
    return target


def write_beir(
    folder: Path,
    corpus: Sequence[Mapping[str, Any]],
    queries: Sequence[Mapping[str, Any]],
    qrels: Sequence[tuple[str, str, int]],
    header: str = "query-id\tcorpus-id\tscore",
) -> Path:
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["\t".join(map(str, judgement)) for judgement in qrels]
    (folder / "qrels" / "test.tsv").write_text("\n".join([header, *lines] if header else lines) + "\n")
    return folder


def words(generator: random.Random) -> str:
    return " ".join(f"w{generator.randrange(20)}" for _ in range(3))


def table(task_type: str, seed: int, rows: int) -> list[dict[str, Any]]:
    """Rows with copies, ties and grades that similarities have something to do with."""
    generator = random.Random(seed)
    found: list[dict[str, Any]] = []
    for i in range(rows):
        first = words(generator)
        # The similarities of copies are 1 but for the last digit, which would rank them.
        second = (
            first
            if i % 7 == 0 and task_type != "sts"
            else f"{first.rsplit(' ', 1)[0]} w{generator.randrange(20)}"
        )
        second = second if i % 2 else words(generator)
        shared = len({*first.split()} & {*second.split()})
        if task_type == "sts":
            found.append(
                {"sentence1": first, "sentence2": second, "score": shared + generator.choice([0, 0.5])}
            )
        elif task_type == "pair_classification":
            found.append(
                {"sentence1": first, "sentence2": second, "label": int(shared + generator.random() > 1.2)}
            )
        elif task_type in ("classification", "clustering"):
            found.append({"text": f"{first} w{i % 3}", "label": ["one", "two", "three"][i % 3]})
        elif task_type == "reranking":
            others = list(dict.fromkeys(words(generator) for _ in range(5)))
            near = [f"{word} {words(generator)} {i}" for word in first.split()[: 1 + i % 2]]
            found.append({"query": first, "positive": near, "negative": others})
        else:
            found.append({"en": first, "de": second})
    return found


def write_table(folder: Path, task_type: str) -> Path:
    """A folder with a test split of 30 rows, for classification also 60 of train."""
    folder.mkdir()
    for split, seed, rows in (
        ("test", 1, 30),
        *((("train", 2, 60),) if task_type == "classification" else ()),
    ):
        lines = (json.dumps(row) + "\n" for row in table(task_type, seed, rows))
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder
