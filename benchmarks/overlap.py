"""What the overlap check finds of planted copies, what it finds besides, how fast, and in how much memory.

    python -m benchmarks.overlap --data FOLDER [--texts 2000]

FOLDER is a BEIR folder whose documents have a `source`. A task of documents of half of the sources is looked
for in planted copies of `texts` of them, a quarter of each kind, all of 25 words or more: case and spacing
changed; every 20th, or every 8th, word another one; the middle 60 %. Then it is looked for in the documents
of the other sources: what is found there is a false alarm, or a text that two sources share.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_embed_core.data.near import words_of
from nemo_embed_core.data.normal_form import normal_form
from nemo_embed_core.evaluation.overlap import PIECE, Overlap, Seen


def planted(text: str, kind: str, generator: random.Random) -> str:
    words = text.split()
    if kind == "case and spacing":
        return "  ".join(words).swapcase() + " !"
    if kind == "middle 60 %":
        return " ".join(words[len(words) // 5 : -(len(words) // 5)])
    every = 20 if kind == "every 20th word" else 8
    for at in range(generator.randrange(every), len(words), every):
        words[at] = f"changed{generator.randrange(10**6)}"
    return " ".join(words)


KINDS = ("case and spacing", "every 20th word", "every 8th word", "middle 60 %")


def run(documents: Sequence[dict[str, Any]], texts: int, seed: int = 0) -> dict[str, Any]:
    """{kind: share of those planted that are found}, false alarms, seconds for a training text."""
    generator = random.Random(seed)
    sources = sorted({one["source"] for one in documents})
    generator.shuffle(sources)
    held_out = set(sources[: len(sources) // 2])
    task = [one for one in documents if one["source"] in held_out]
    task = generator.sample(task, min(4 * texts, len(task)))
    long = [one for one in task if len(words_of(normal_form(one["text"]))) >= 25][:texts]
    kind_of = {one["_id"]: KINDS[i % len(KINDS)] for i, one in enumerate(long)}
    rest = [one["text"] for one in documents if one["source"] not in held_out]
    found = {}
    for name, training in (
        ("planted", [planted(one["text"], kind_of[one["_id"]], generator) for one in long]),
        ("other sources", rest),
    ):
        overlap = Overlap({"documents": {one["_id"]: one["text"] for one in task}})
        begun = time.process_time()
        for start in range(0, len(training), PIECE):
            part = training[start : start + PIECE]
            overlap.show(part, [name] * len(part))
        seconds = time.process_time() - begun
        kinds = overlap.kinds()["documents"]
        found[name] = {"texts": len(training), "us_a_text": 1e6 * seconds / len(training), "kinds": kinds}
    own, chance = found["planted"]["kinds"], found["other sources"]["kinds"]
    return {
        "found": {
            kind: np.mean([name in own for name, of in kind_of.items() if of == kind]) for kind in KINDS
        },
        "task": len(task),
        "false": {kind: sum(of == kind for of in chance.values()) for kind in ("exact", "near", "cut")},
        "training": found["other sources"]["texts"],
        "us_a_text": found["other sources"]["us_a_text"],
    }


def seen_bytes(keys: int) -> float:
    """Bytes a key that Seen holds after so many, and that the process took at most."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seen, generator = Seen(), np.random.default_rng(0)
    for _ in range(keys // PIECE):
        seen.new(generator.integers(0, 2**63, PIECE).astype(np.uint64))
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / keys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--documents", type=int, default=40_000, help="sampled of the corpus; 0: all")
    options = parser.parse_args()
    with gzip.open(Path(options.data) / "corpus.jsonl.gz") as file:
        documents = [json.loads(line) for line in file]
    if options.documents and options.documents < len(documents):
        documents = random.Random(1).sample(documents, options.documents)
    report = run(documents, options.texts)
    for kind, share in report["found"].items():
        print(f"{kind:20} {share:7.1%} found")
    false = ", ".join(f"{count} {kind}" for kind, count in report["false"].items())
    total = sum(report["false"].values())
    print(
        f"not planted: {false} of {report['task']:,} ({total / report['task']:.2%}) in "
        f"{report['training']:,} documents of other sources; "
        f"{report['us_a_text']:.0f} us of one core a training text"
    )
    print(f"{seen_bytes(16 << 20):.1f} bytes of memory for each of 16 M training texts")


if __name__ == "__main__":
    main()
