"""Models of a dozen words and folders of BEIR form for them."""

from __future__ import annotations

import json
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
