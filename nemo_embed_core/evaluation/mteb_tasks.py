"""mteb's task classes on rows that are in memory: figures, and what each row adds to them."""

from __future__ import annotations

from collections import Counter
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_embed_core.checkpoint.source import DEFAULT_LENGTH, Usage
from nemo_embed_core.encoders.protocol import TextEncoder
from nemo_embed_core.encoders.sentence_transformer import pieces
from nemo_embed_core.evaluation.bm25 import REVISION, Bm25
from nemo_embed_core.evaluation.encoding import Encoding
from nemo_embed_core.evaluation.retrieval import (
    PIECE_CHARACTERS,
    model_meta,
    rank_of_ids,
    similarity_of,
    task_metadata,
)

if TYPE_CHECKING:
    from torch import Tensor

Row = dict[str, Any]
NEIGHBOURS = 5  # of the kNN classifier, as many as scikit-learn's


class Vectors:
    """A model as mteb asks one: texts to vectors, as queries, but for what mteb says are documents.

    usage: its prompts go by the tasks' names, the default is of the others.  keep: each text of a task is
    encoded once, at the cost of its row; without it whenever mteb asks.
    """

    def __init__(self, encoder: TextEncoder | Encoding, usage: Usage, keep: bool = True):
        self.encoding = encoder if isinstance(encoder, Encoding) else Encoding(encoder)
        self.usage, self.keep = usage, keep
        self.mteb_model_meta = model_meta(encoder.digest, "dense")
        self.rows: dict[tuple[str, str], dict[str, np.ndarray]] = {}  # by side and prompt
        self.num: Counter[str] = Counter()
        self.lost: dict[str, int | None] = {"query": 0, "document": 0}

    @property
    def truncated(self) -> dict[str, float | None]:
        """Share of the texts of each side that were cut; where there are no documents, of the queries."""
        shares: dict[str, float | None] = {}
        for side in self.lost:
            known = side if self.num[side] else "query"
            lost = self.lost[known]
            shares[side] = None if lost is None else lost / max(1, self.num[known])
        return shares

    def encode(self, inputs: Any, prompt_type: Any = None, task_metadata: Any = None, **_: Any) -> np.ndarray:
        side = "document" if prompt_type == "document" else "query"
        texts = [text for batch in inputs for text in batch["text"]]
        prompt = getattr(self.usage.prompts.get(getattr(task_metadata, "name", ""), self.usage.default), side)
        rows = self.rows.setdefault((side, prompt), {}) if self.keep else {}
        new = [text for text in dict.fromkeys(texts) if text not in rows]
        for piece in pieces(new, PIECE_CHARACTERS):
            length = getattr(self.usage, f"{side}_max_length") or DEFAULT_LENGTH
            found, cut = self.encoding.rows(piece, prompt, length, side)
            before = self.lost[side]
            self.lost[side] = None if before is None or cut is None else before + cut
            self.num[side] += len(piece)
            rows.update(zip(piece, found, strict=True))
        return np.stack([rows[text] for text in texts])

    def similarity(self, first: Any, second: Any) -> Tensor:
        import torch

        a, b = (torch.as_tensor(np.asarray(x)) for x in (first, second))
        return similarity_of(self.usage.similarity)(a, b)

    def similarity_pairwise(self, first: Any, second: Any) -> Tensor:
        """Of each row with its own, [n], to the last digit as sentence-transformers: copies of texts tie."""
        from sentence_transformers.util import SimilarityFunction

        pairwise = SimilarityFunction.to_similarity_pairwise_fn(self.usage.similarity)
        return pairwise(np.asarray(first), np.asarray(second))


class Bm25Search:
    """BM25 as mteb asks a search: over the whole corpus, or of the candidates that each query has.

    A document without a word of the query is not found; of candidates all are ranked, those with 0.
    """

    def __init__(self) -> None:
        self.mteb_model_meta = model_meta(REVISION, "sparse")
        self.corpus: Any = None

    def index(self, corpus: Any, **_: Any) -> None:
        self.corpus = corpus

    def search(
        self, queries: Any, top_k: int, top_ranked: Any = None, **_: Any
    ) -> dict[str, dict[str, float]]:
        ids, asked = list(self.corpus["id"]), _texts(queries)
        bm25 = Bm25(_texts(self.corpus), queries=asked)
        if top_ranked is None:
            best = bm25.top(asked, top_k, first=-rank_of_ids(ids))
            return {
                query: {ids[i]: float(score) for i, score in zip(*found, strict=True)}
                for query, found in zip(queries["id"], best, strict=True)
            }
        places = {name: i for i, name in enumerate(ids)}
        found = {}
        for query, text in zip(queries["id"], asked, strict=True):
            scores_N = bm25.scores(text)
            found[query] = {name: float(scores_N[places[name]]) for name in top_ranked.get(query, ())}
        return found


def _texts(rows: Any) -> list[str]:
    """As mteb gives them to a model: a document's title before it, a query's instruction behind it."""
    names = [name for name in ("title", "text", "instruction") if name in rows.column_names]
    return [" ".join(filter(None, parts)).strip() for parts in zip(*(rows[n] for n in names), strict=True)]


def run(task: Any, splits: dict[str, dict[str, list[Any]]], model: Vectors) -> dict[str, Any]:
    """The scores of a task whose data set is `splits`, {split: {column: values}}."""
    from datasets import Dataset, DatasetDict

    task.dataset = DatasetDict({name: Dataset.from_dict(columns) for name, columns in splits.items()})
    return _evaluated(task, model)


def _evaluated(task: Any, model: Vectors | Bm25Search) -> dict[str, Any]:
    task.data_loaded = True
    return task.evaluate(model, "test", encode_kwargs={"batch_size": 1024})["default"]


def _pairs(rows: list[Row], label: str = "", back: bool = False) -> dict[str, dict[str, list[Any]]]:
    first, second = ("other", "text") if back else ("text", "other")
    columns = {"sentence1": [row[first] for row in rows], "sentence2": [row[second] for row in rows]}
    return {"test": {**columns, **({label: [row["gold"] for row in rows]} if label else {})}}


def sts(model: Vectors, rows: list[Row], train: list[Row]) -> tuple[dict[str, float], list[float]]:
    """Correlations of the model's similarities with the grades, and the similarities."""
    from mteb.abstasks import AbsTaskSTS

    predicted: list[float] = []

    class LocalSts(AbsTaskSTS):
        metadata = task_metadata("STS", "spearman")

        def _calculate_scores(self, scores: Any, normalized_scores: Any) -> Any:
            predicted.extend(scores["similarity_scores"])
            return super()._calculate_scores(scores, normalized_scores)

    found = run(LocalSts(), _pairs(rows, "score"), model)
    return {name: found[name] for name in ("spearman", "pearson", "cosine_spearman")}, predicted


def pair_classification(
    model: Vectors, rows: list[Row], train: list[Row]
) -> tuple[dict[str, float], list[float]]:
    """Average precision, and accuracy and F1 at their best thresholds; the similarities."""
    from mteb.abstasks import AbsTaskPairClassification

    predicted: list[float] = []

    class LocalPairs(AbsTaskPairClassification):
        metadata = task_metadata("PairClassification", "similarity_ap")

        def _compute_metrics(self, similarity_scores: Any, labels: Any) -> Any:
            predicted.extend(similarity_scores["similarity_scores"])
            return super()._compute_metrics(similarity_scores, labels)

    found = run(LocalPairs(), _pairs(rows, "labels"), model)
    names = ("similarity_ap", "similarity_f1", "similarity_accuracy", "max_ap")
    return {name: found[name] for name in names}, predicted


def classification(model: Vectors, rows: list[Row], train: list[Row]) -> tuple[dict[str, float], list[float]]:
    """Accuracy and macro F1 over mteb's experiments, by logistic regression and by the nearest neighbours; in
    how many of the regressions each row was right."""
    from mteb.abstasks import AbsTaskClassification
    from sklearn.neighbors import KNeighborsClassifier

    right: list[np.ndarray] = []
    labels = {label: i for i, label in enumerate(sorted({row["gold"] for row in (*train, *rows)}))}

    class LocalClassification(AbsTaskClassification):
        metadata = task_metadata("Classification", "accuracy")

        def _calculate_scores(self, y_test: Any, y_pred: Any) -> Any:
            right.append(np.asarray(y_test) == np.asarray(y_pred))
            return super()._calculate_scores(y_test, y_pred)

    splits = {
        name: {"text": [row["text"] for row in part], "label": [labels[row["gold"]] for row in part]}
        for name, part in (("train", train), ("test", rows))
    }
    found = run(LocalClassification(), splits, model)
    share = np.mean(right, axis=0).tolist()
    nearest = LocalClassification()
    nearest.evaluator_model = KNeighborsClassifier(n_neighbors=min(NEIGHBOURS, len(train)))
    by_neighbours = run(nearest, splits, model)
    figures = {name: found[name] for name in ("accuracy", "f1")}
    return {**figures, **{f"knn_{name}": by_neighbours[name] for name in figures}}, share


def bitext(model: Vectors, rows: list[Row], train: list[Row]) -> tuple[dict[str, float], list[float]]:
    """F1 of the nearest text from the first to the second side and back, and their mean; of each row its part
    of the mean, 2 tp / (2 tp + fp + fn) of it as a class."""
    from mteb.abstasks import AbsTaskBitextMining

    parts: list[list[float]] = []

    class LocalBitext(AbsTaskBitextMining):
        metadata = task_metadata("BitextMining", "f1")

        def _compute_metrics(self, nearest_neighbors: Any, gold: Any) -> Any:
            found = [int(neighbour["corpus_id"]) for neighbour in nearest_neighbors]
            times = Counter(found)
            parts.append([2 * (j == i) / (1 + times[i]) for i, j in enumerate(found)])
            return super()._compute_metrics(nearest_neighbors, gold)

    forth, back = (run(LocalBitext(), _pairs(rows, back=turned), model)["f1"] for turned in (False, True))
    figures = {"f1": (forth + back) / 2, "f1_forth": forth, "f1_back": back}
    return figures, np.mean(parts, axis=0).tolist()


def reranking(
    model: Vectors | Bm25Search, rows: list[Row], train: list[Row]
) -> tuple[dict[str, float], list[float]]:
    """MAP, nDCG@10 and MRR@10 of each query's own candidates in the order of their similarities; each MAP."""
    from datasets import Dataset
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

    each: list[float] = []
    candidates = {
        row["id"]: [(text, grade) for side, grade in (("positive", 1), ("negative", 0)) for text in row[side]]
        for row in rows
    }
    # Ids in an order of their own: of equal similarities the greater id comes first.
    ids = {
        i: [f"{i} {sha256(text.encode()).hexdigest()}" for text, _ in texts]
        for i, texts in candidates.items()
    }

    class LocalReranking(AbsTaskRetrieval):
        metadata = task_metadata("Reranking", "map_at_1000")

        def task_specific_scores(self, scores: Any, *_: Any, **__: Any) -> dict[str, float]:
            each.extend(scores[row["id"]]["map_cut_1000"] for row in rows)
            return {}

    texts = {name: text for i in ids for name, (text, _) in zip(ids[i], candidates[i], strict=True)}
    task = LocalReranking()
    data = RetrievalSplitData(
        corpus=Dataset.from_dict(
            {"id": list(texts), "title": [""] * len(texts), "text": list(texts.values())}
        ),
        queries=Dataset.from_dict({"id": list(ids), "text": [row["text"] for row in rows]}),
        relevant_docs={
            i: {name: grade for name, (_, grade) in zip(ids[i], candidates[i], strict=True)} for i in ids
        },
        top_ranked=ids,
    )
    task.dataset = {"default": {"test": data}}
    found = _evaluated(task, model)
    return {name: found[name] for name in ("map_at_1000", "ndcg_at_10", "mrr_at_10")}, each


def clustering(model: Vectors, rows: list[Row], train: list[Row]) -> tuple[dict[str, float], list[float]]:
    """V-measure and adjusted mutual information of k-means with as many clusters as labels, means of mteb's
    ten draws of the texts. No row has a score of its own."""
    from mteb.abstasks import AbsTaskClustering

    class LocalClustering(AbsTaskClustering):
        metadata = task_metadata("Clustering", "v_measure")
        max_fraction_of_documents_to_embed = None  # all, where mteb's tasks take 4 % of their large sets

    columns = {"sentences": [row["text"] for row in rows], "labels": [row["gold"] for row in rows]}
    found = run(LocalClustering(), {"test": columns}, model)
    return {name: found[name] for name in ("v_measure", "ami")}, []
