"""The public release made small: all 14 subsets in its layout, three of ids that a source has the texts of.

write_release(folder)      folder/data/embed-nemotron-dataset-v1/NAME, folder/data/sources/NAME
"""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from recipes import MIX

RELEASE, NUM_ROWS = "data/embed-nemotron-dataset-v1", 10
NAMES = re.findall(rf"^  - {{path: {RELEASE}/(\w+), cap: \d+}}$", MIX.read_text(encoding="utf-8"), re.M)
ROWS = dict.fromkeys(NAMES, NUM_ROWS) | {"PAQ": 2 * NUM_ROWS, "MSMARCO": NUM_ROWS + 1}  # over the paper's
LOADERS = {
    "FEVER": "mteb",
    "HotpotQA": "mteb",
    "GooAQ": "column",
}  # of ids only; in the release its metadata says it
CLASSES = {"EmotionClassification", "SyntheticClassificationData"}
LABELS = ["joy", "anger", "fear"]


def query(name: str, i: int) -> str:
    return f"find {name} river number {i}"


def document(name: str, i: int) -> str:
    return f"{name} moon and violin {i} of the tower"


def write_release(folder: Path) -> None:
    for name, count in ROWS.items():
        _write_subset(folder, name, count)


def _write_subset(folder: Path, name: str, count: int) -> None:
    is_class, loader = name in CLASSES, LOADERS.get(name, "")
    num_documents = count if loader == "column" else 2 * count
    documents = LABELS if is_class else [document(name, i) for i in range(num_documents)]
    queries = [query(name, i) for i in range(count)]

    def entry(i: int) -> dict[str, str]:
        return {"id": f"d_{i % len(documents)}"}

    rows = [
        {"question_id": f"q_{i}", "question": queries[i], "corpus_id": name, "pos_doc": [entry(i)],
         "neg_doc": [entry(i + j) for j in ((1, 2) if is_class else (1, 2, 3, 5, 7))]}
        for i in range(count)
    ]  # fmt: skip
    corpus = [{"id": f"d_{i}", "text": text} for i, text in enumerate(documents)]
    if loader:
        rows = [{key: value for key, value in row.items() if key != "question"} for row in rows]
        corpus = [{"id": row["id"]} for row in corpus]
    path = folder / RELEASE / name
    path.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), path / "queries.parquet")
    pq.write_table(pa.Table.from_pylist(corpus), path / "corpus.parquet")
    task = "Classify the text" if is_class else f"Answer the question of {name}"
    metadata = {
        "class": "TextQADataset", "corpus_id": name, "query_instruction": f"Instruct: {task}\nQuery:",
        "passage_instruction": "", "task_type": "Classification" if is_class else "Retrieval",
        "ids_only": bool(loader),
    }  # fmt: skip
    (path / "dataset_metadata.json").write_text(json.dumps(metadata))
    if loader:
        source = {"loader_config": loader, "source_repo": f"someone/{name}", "subset": None, "split": "train"}
        columns = {"query_column": "question", "document_column": "answer"} if loader == "column" else {}
        (path / "source_config.json").write_text(json.dumps(source | columns))
        _write_source(folder / "data/sources" / name, loader, queries, documents)


def _write_source(folder: Path, loader: str, queries: list[str], documents: list[str]) -> None:
    """As its publisher has it, whose own ids do not count."""
    folder.mkdir(parents=True)
    if loader == "column":
        pq.write_table(pa.table({"question": queries, "answer": documents}), folder / "train.parquet")
        return
    for side, letter, texts in (("corpus", "c", documents), ("queries", "u", queries)):
        rows = [{"_id": f"{letter}{i}", "text": text} for i, text in enumerate(texts)]
        (folder / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
