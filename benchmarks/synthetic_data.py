"""The rows of configs/experiments/synthetic.yaml: python -m benchmarks.synthetic_data [--requests 4000]

Synthesis asks an endpoint on this machine (benchmarks/synthesis_server.py) for the same requests four times:
of one task or of five, from one generator or from four. The generators know the texts of
runs/experiment-data/train.jsonl (python -m benchmarks.experiment_data) and write by rule: the positive is
such a text, the hard negative the one of twelve that shares the most words with it, and the query some of the
positive's words in the form of its task. A generator chooses words in its own way. Language models differ in
more than that: what the experiment says is of this toy.

    runs/experiment-synthetic/{plain,tasks,generators,both}/datasets/TASK
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.synthesis_server import Server

ROOT = Path(__file__).resolve().parents[1]
CODES = {"en": "English", "de": "German", "fr": "French", "it": "Italian"}
TASKS = ("question", "claim", "keywords", "problem", "description")
# What a task's query says besides words of its document, in each language.
FORMS = {
    "question": {
        "English": "What is there for {}?", "German": "Was gibt es für {}?",
        "French": "Qu'y a-t-il pour {} ?", "Italian": "Che cosa c'è per {}?",
    },
    "claim": {
        "English": "It is known that {}.", "German": "Bekannt ist, dass {}.", "French": "On sait que {}.",
        "Italian": "Si sa che {}.",
    },
    "keywords": dict.fromkeys(CODES.values(), "{}"),
    "problem": {
        "English": "I have trouble with {}, and nothing helps.",
        "German": "Ich habe Ärger mit {}, nichts hilft.",
        "French": "J'ai des ennuis avec {}, rien ne va.", "Italian": "Ho problemi con {}, niente aiuta.",
    },
    "description": {
        "English": "It has to do with {}.", "German": "Es hat mit {} zu tun.",
        "French": "Cela concerne {}.", "Italian": "Riguarda {}.",
    },
}  # fmt: skip
# The key that a generator sorts a text's words by, the first ones of which are its query's:
# (place in the text, share of texts that have the word, a number drawn)
GENERATORS: dict[str, Callable[[int, float, float], float]] = {
    "rare": lambda place, share, drawn: share,
    "first": lambda place, share, drawn: place,
    "last": lambda place, share, drawn: -place,
    "any": lambda place, share, drawn: drawn,
}


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]{3,}", text.lower())


class Writers(Server):
    def __init__(self, texts: Sequence[tuple[str, str]]):
        """texts: (language, text)."""
        super().__init__()
        self.texts: dict[str, list[str]] = {name: [] for name in CODES.values()}
        for language, text in texts:
            self.texts[language].append(text)
        self.words = {text: set(words_of(text)) for _, text in texts}
        counts = Counter(word for words in self.words.values() for word in words)
        self.share = {word: count / len(self.words) for word, count in counts.items()}

    def _answer(self, prompt: str, rng: random.Random, model: str) -> dict[str, Any]:
        said = re.search(r"All texts are in (\w+)\.", prompt)
        assert said is not None
        language = said[1]
        (low, high), (least, _) = ((int(a), int(b)) for a, b in re.findall(r"(\d+) to (\d+) words", prompt))
        known = [text for text in self.texts[language] if len(text.split()) >= least / 2 + 1]
        positive, *others = rng.sample(known, 13)
        own = self.words[positive]
        negative = max(others, key=lambda text: len(own & self.words[text]) / len(own | self.words[text]))
        (task,) = (name for name in TASKS if WANTED[name] in " ".join(prompt.split()))
        words = list(dict.fromkeys(words_of(positive)))
        place = {word: i for i, word in enumerate(words)}
        key = GENERATORS[model]
        drawn = {word: rng.random() for word in words}
        chosen = sorted(words, key=lambda word: key(place[word], self.share[word], drawn[word]))
        chosen = chosen[: max(2, rng.randint(low, high) - 2 * (task != "keywords"))]
        rng.shuffle(chosen)
        query = FORMS[task][language].format(" ".join(chosen))
        return {"query": query, "positive": positive, "hard_negative": negative}


# How each task's prompt speaks of its query.
WANTED = {
    "question": "a question", "claim": "a claim", "keywords": "typed into a search box",
    "problem": "description of a problem", "description": "does not name it",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--data", default="runs/experiment-data/train.jsonl")
    parser.add_argument("--output", default="runs/experiment-synthetic")
    args = parser.parse_args()
    rows = [json.loads(line) for line in Path(args.data).read_text(encoding="utf-8").splitlines()]
    texts = [(CODES[row["lang"]], row["pos"][0]) for row in rows if row["lang"] in CODES]
    with Writers(texts) as server:
        for name, tasks, generators in (
            ("plain", TASKS[:1], ["rare"]),
            ("tasks", TASKS, ["rare"]),
            ("generators", TASKS[:1], [*GENERATORS]),
            ("both", TASKS, [*GENERATORS]),
        ):
            models = [{"name": model, "base_url": server.url, "max_in_flight": 8} for model in generators]
            config = {
                "output": f"{args.output}/{name}",
                "generate": {
                    "requests": args.requests, "languages": list(CODES.values()), "models": models,
                    "tasks": dict.fromkeys(tasks, 1.0),
                },
            }  # fmt: skip
            file = Path(args.output) / f"{name}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(config))
            command = [sys.executable, str(ROOT / "launch/synthesize.py"), "--config", str(file)]
            subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


if __name__ == "__main__":
    main()
