"""The data of configs/experiments/ from two folders of public texts: python -m benchmarks.experiment_data

    --debian DIR   BEIR form, documents with lang, package and section: descriptions of Debian's packages in
                   14 languages (query: the one-line summary; document: the long description)
    --stsb DIR     STS benchmark, {en,de,fr,zh}-{train,dev}.csv.gz: sentence1, sentence2, score 0-5

Everything is drawn by whole packages of one split, from one seed, so that no description of a package is in
training and test, in whatever language:

    train.jsonl      summary -> description in its own language
    cross.jsonl      summary -> the English description, of the same packages
    labels/          the same queries, all descriptions of their package relevant: what mining on train.jsonl
                     may take for negatives and are none
    test/            BEIR, split test: own language; split cross: English, from documents of all languages
    sections/        train.jsonl, test.jsonl: descriptions and their section, for classification
    sts-train.jsonl, sts.jsonl    pairs and grades of the four languages' train, and of English dev
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

LANGUAGES = ("en", "de", "fr", "zh")
Record = dict[str, Any]


def records(file: Path) -> Iterator[Record]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def write(file: Path, rows: Iterable[Record]) -> int:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def packages_of(debian: Path, split: str, documents: Mapping[str, Record]) -> dict[str, dict[str, Record]]:
    """package -> language -> its document, of a split."""
    found: dict[str, dict[str, Record]] = defaultdict(dict)
    for line in (debian / "qrels" / f"{split}.tsv").read_text().splitlines()[1:]:
        document = documents[line.split("\t")[1]]
        found[document["package"]][document["lang"]] = document
    return found


def drawn(packages: dict[str, dict[str, Record]], count: int, seed: int) -> dict[str, dict[str, Record]]:
    """Packages described in English and another language at least, until they have `count` documents."""
    names = sorted(name for name, texts in packages.items() if "en" in texts and len(texts) > 1)
    random.Random(seed).shuffle(names)
    chosen, total = {}, 0
    for name in names:
        if total >= count:
            break
        chosen[name] = packages[name]
        total += len(packages[name])
    return chosen


def beir(
    folder: Path, documents: Iterable[Record], queries: Iterable[Record], qrels: Mapping[str, Any]
) -> None:
    write(folder / "corpus.jsonl", documents)
    write(folder / "queries.jsonl", queries)
    (folder / "qrels").mkdir(exist_ok=True)
    for split, pairs in qrels.items():
        lines = ["query-id\tcorpus-id\tscore", *(f"{query}\t{document}\t1" for query, document in pairs)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")


def debian_data(debian: Path, output: Path, rows: int, queries: int, documents: int) -> dict[str, int]:
    texts = {document["_id"]: document for document in records(debian / "corpus.jsonl.gz")}
    asked = {query["_id"]: query["text"] for query in records(debian / "queries.jsonl.gz")}
    train = drawn(packages_of(debian, "train", texts), rows, seed=0)
    dev = packages_of(debian, "dev", texts)
    test = drawn(dev, queries, seed=1)
    all_train = [document for own in train.values() for document in own.values()]
    all_test = [document for own in test.values() for document in own.values()]

    def row(document: Record, target: Record) -> Record:
        query = asked[f"q:{document['_id']}"]
        return {"query": query, "pos": [target["text"]], "neg": [], "lang": document["lang"]}

    counts = {
        "train": write(output / "train.jsonl", [row(document, document) for document in all_train]),
        "cross": write(output / "cross.jsonl", [
            row(document, own["en"]) for own in train.values() for document in own.values()
            if document["lang"] != "en"
        ]),
    }  # fmt: skip

    def query_of(document: Record) -> Record:
        query = f"q:{document['_id']}"
        return {"_id": query, "text": asked[query], "lang": document["lang"]}

    def same(group: Mapping[str, Mapping[str, Record]]) -> Iterator[tuple[str, str]]:
        for own in group.values():
            yield from ((f"q:{a['_id']}", b["_id"]) for a in own.values() for b in own.values())

    own_language = [(f"q:{document['_id']}", document["_id"]) for document in all_test]
    crossed = [(q, d) for q, d in same(test) if d.startswith("en:") and not q.startswith("q:en:")]
    beir(output / "labels", all_train, map(query_of, all_train), {"test": same(train)})
    others = [d for name, own in sorted(dev.items()) if name not in test for d in own.values()]
    pool = all_test + random.Random(2).sample(others, max(0, min(len(others), documents - len(all_test))))
    beir(output / "test", pool, map(query_of, all_test), {"test": own_language, "cross": crossed})
    common = [name for name, count in Counter(d["section"] for d in all_train).most_common(12) if count > 20]
    for split, found in (("train", all_train), ("test", all_test)):
        labelled = [{"text": d["text"], "label": d["section"]} for d in found if d["section"] in common]
        counts[f"sections {split}"] = write(output / "sections" / f"{split}.jsonl", labelled)
    return counts | {
        "test queries": len(all_test),
        "of them cross": len(crossed),
        "test documents": len(pool),
    }


def sts_data(stsb: Path, output: Path) -> dict[str, int]:
    def pairs(*files: str) -> Iterator[Record]:
        for file in files:
            with gzip.open(stsb / f"{file}.csv.gz", "rt", encoding="utf-8", newline="") as lines:
                for first, second, grade in csv.reader(lines):
                    yield {"sentence1": first, "sentence2": second, "score": float(grade)}

    train = write(output / "sts-train.jsonl", pairs(*(f"{language}-train" for language in LANGUAGES)))
    return {"sts train": train, "sts": write(output / "sts.jsonl", pairs("en-dev"))}


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--debian", type=Path, required=True)
    parser.add_argument("--stsb", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/experiment-data"))
    parser.add_argument("--rows", type=int, default=6000, help="of train.jsonl, about")
    parser.add_argument("--queries", type=int, default=1000, help="of the test, about")
    parser.add_argument("--documents", type=int, default=3000, help="of the test")
    given = parser.parse_args()
    counts = debian_data(given.debian, given.output, given.rows, given.queries, given.documents)
    print(json.dumps(counts | sts_data(given.stsb, given.output)))


if __name__ == "__main__":
    main()
