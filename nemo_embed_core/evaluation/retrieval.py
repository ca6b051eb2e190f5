"""nDCG@10, recall@10 and MRR@10 of an exact search, through mteb's own retrieval task and evaluator, offline.

The search is ours and mteb sees ids and scores alone, so texts stay on disk. Of equal scores the greater id
comes first, as in trec_eval, which mteb's figures come from.

mteb takes 4 seconds to import, so it is imported inside. The task is run directly instead of through
`mteb.evaluate`: that one keeps results by model name and revision, and serves two local checkpoints one
another's scores.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_embed_core.checkpoint.source import DEFAULT_LENGTH, Similarity, Usage
from nemo_embed_core.data.readers import Beir
from nemo_embed_core.encoders.protocol import TextEncoder
from nemo_embed_core.encoders.sentence_transformer import pieces
from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation.bm25 import REVISION, Bm25
from nemo_embed_core.evaluation.encoding import Encoding

if TYPE_CHECKING:
    from torch import Tensor

METRICS = ("ndcg_at_10", "recall_at_10", "mrr_at_10")
# Documents of a query that mteb gets: ten, and one in place of the query itself (ignore_identical_ids).
DEPTH = 11

PIECE_CHARACTERS = 8 << 20  # of the texts that are in memory and encoded at a time
MAX_SCORES = 16 << 20  # fp32 query-document scores held at a time, 64 MB


def evaluate_retrieval(
    encoder: TextEncoder | Encoding,
    beir: Beir,
    usage: Usage | None = None,
    *,
    ignore_identical_ids: bool = False,
) -> dict[str, Any]:
    """{"ndcg_at_10", "recall_at_10", "mrr_at_10"} over the queries, "per_query" of each, and "truncated", the
    share of each side.

    usage: the default prompts, the lengths and the similarity of it. A share is None where the encoder cannot
    say it. ignore_identical_ids: a document with the query's own id is not counted as found, mteb's flag of
    that name (ArguAna).
    """
    parts = evaluate_parts(encoder, beir.corpus, [beir], usage, ignore_identical_ids=ignore_identical_ids)
    return parts[0]


def evaluate_parts(
    encoder: TextEncoder | Encoding,
    corpus: Mapping[str, str],
    parts: Sequence[Beir],
    usage: Usage | None = None,
    *,
    ignore_identical_ids: bool = False,
) -> list[dict[str, Any]]:
    """evaluate_retrieval of each: splits and pools of one corpus, every text encoded once.

    The corpus of a part is this one, or some documents of it in its order; an id has one text.
    """
    import torch

    for part in parts:
        _check(part)
    usage = usage or Usage()
    encoding = encoder if isinstance(encoder, Encoding) else Encoding(encoder)
    truncated: dict[str, float | None] = {}

    def encode(side: str, texts: Mapping[str, str], prompt: str, max_length: int | None) -> Iterator[Tensor]:
        lost: int | None = 0
        # Documents as mteb gives them to a model, without the white space around them.
        read = (text.strip() for text in texts.values()) if side == "document" else iter(texts.values())
        for piece in pieces(read, PIECE_CHARACTERS):
            vectors, cut = encoding.rows(piece, prompt, max_length or DEFAULT_LENGTH, side)
            lost = None if lost is None or cut is None else lost + cut
            yield torch.from_numpy(vectors).to(encoding.device)
        truncated[side] = None if lost is None else lost / len(texts)

    prompts = usage.default
    queries = {query: text for part in parts for query, text in part.queries.items()}
    queries_QD = torch.cat(list(encode("query", queries, prompts.query, usage.query_max_length)))
    similarity = similarity_of(usage.similarity)
    places = {query: i for i, query in enumerate(queries)}
    of_part = [torch.tensor([places[query] for query in part.queries]) for part in parts]
    best = [Best(len(part.queries), list(part.corpus)) for part in parts]
    is_whole = [len(part.corpus) == len(corpus) for part in parts]
    # One pass over the ids of each smaller corpus, in step with the documents.
    inside = [
        torch.ones(0) if whole else torch.tensor([document in part.corpus for document in corpus])
        for part, whole in zip(parts, is_whole, strict=True)
    ]
    step, first = max(1, MAX_SCORES // len(queries_QD)), 0
    for documents_ND in encode("document", corpus, prompts.document, usage.document_max_length):
        for part_ND in documents_ND.split(step):
            scores_QN = similarity(queries_QD, part_ND)
            for i, held in enumerate(best):
                own_QN = scores_QN if len(parts) == 1 else scores_QN[of_part[i].to(scores_QN.device)]
                if not is_whole[i]:
                    own_QN = own_QN[:, inside[i][first : first + len(part_ND)].to(own_QN.device)]
                held.add(own_QN)
            first += len(part_ND)
    return [
        {
            **_figures(held.found(part.queries), part, encoding.digest, "dense", ignore_identical_ids),
            "truncated": dict(truncated),
        }
        for part, held in zip(parts, best, strict=True)
    ]


def similarity_of(name: Similarity) -> Callable[[Tensor, Tensor], Tensor]:
    """(queries [Q, D], documents [N, D]) -> scores [Q, N], greater for nearer."""
    import torch
    from torch.nn.functional import normalize

    return {
        "cosine": lambda q, d: normalize(q, dim=1) @ normalize(d, dim=1).T,
        "dot": lambda q, d: q @ d.T,
        # Not by a matrix product, which loses the digits that tell near documents apart.
        "euclidean": lambda q, d: -torch.cdist(q, d, p=2.0, compute_mode="donot_use_mm_for_euclid_dist"),
        "manhattan": lambda q, d: -torch.cdist(q, d, p=1.0),
    }[name]


class Best:
    """The DEPTH best documents of each query: greater scores first, of equal ones the greater id.

    Exact in both, however the documents are split over calls of `add` and however many share a score.
    """

    def __init__(self, num_queries: int, ids: Sequence[Any]):
        self.num_queries, self.ids, self.rank_N = num_queries, ids, rank_of_ids(ids)
        self.rows = np.empty(0, np.int64)  # query of each document that is held
        self.documents = np.empty(0, np.int64)
        self.scores = np.empty(0, np.float32)
        self.floor_Q = np.full(num_queries, -np.inf, np.float32)  # nothing below it can be among the best
        self.num_added = 0

    def add(self, scores_QN: Tensor, documents_N: np.ndarray | None = None) -> None:
        """The scores of the next N documents, or of these."""
        import torch

        if documents_N is None:
            documents_N = np.arange(self.num_added, self.num_added + scores_QN.shape[1])

        floor_Q = torch.from_numpy(self.floor_Q).to(scores_QN.device)
        if scores_QN.shape[1] >= DEPTH:
            floor_Q = torch.maximum(floor_Q, scores_QN.topk(DEPTH, dim=1).values[:, -1])
        new_rows, columns = (scores_QN >= floor_Q[:, None]).nonzero(as_tuple=True)
        self.num_added += scores_QN.shape[1]
        new_scores = scores_QN[new_rows, columns].cpu().numpy()
        self.merge(new_rows.cpu().numpy(), documents_N[columns.cpu().numpy()], new_scores)

    def merge(self, rows: np.ndarray, documents: np.ndarray, scores: np.ndarray) -> None:
        """Further documents of queries, by their numbers, and their scores."""
        rows = np.concatenate([self.rows, rows])
        documents = np.concatenate([self.documents, documents])
        scores = np.concatenate([self.scores, scores])
        order = np.lexsort((-self.rank_N[documents], -scores, rows))
        rows, documents, scores = rows[order], documents[order], scores[order]
        place = np.arange(len(rows)) - np.searchsorted(rows, rows)
        self.rows, self.documents, self.scores = (held[place < DEPTH] for held in (rows, documents, scores))
        self.floor_Q[rows[place == DEPTH - 1]] = scores[place == DEPTH - 1]

    def found(self, queries: Iterable[str]) -> dict[str, dict[str, float]]:
        """{query id: {document id: score}}; queries: the ids of the rows, in order."""
        names = list(queries)
        found: dict[str, dict[str, float]] = {name: {} for name in names}
        for row, document, score in zip(self.rows, self.documents, self.scores, strict=True):
            found[names[row]][self.ids[int(document)]] = float(score)
        return found


def rank_of_ids(ids: Sequence[Any]) -> np.ndarray:
    """[i]: place of ids[i] among them in ascending order."""
    if isinstance(ids, range):
        return np.arange(len(ids))
    ranks = np.empty(len(ids), np.int64)
    ranks[np.array(sorted(range(len(ids)), key=ids.__getitem__), np.int64)] = np.arange(len(ids))
    return ranks


def evaluate_bm25(beir: Beir, *, ignore_identical_ids: bool = False) -> dict[str, Any]:
    """The same figures for words instead of vectors; a document without a word of the query is not found."""
    _check(beir)
    bm25 = Bm25(beir.corpus.values(), queries=beir.queries.values())
    ids = list(beir.corpus)
    top = bm25.top(beir.queries.values(), DEPTH, first=-rank_of_ids(ids))
    found = {
        query: {ids[i]: float(score) for i, score in zip(*best, strict=True)}
        for query, best in zip(beir.queries, top, strict=True)
    }
    return _figures(found, beir, REVISION, "sparse", ignore_identical_ids)


def _check(beir: Beir) -> None:
    if not beir.queries or not beir.corpus:
        raise UserError(f"nothing to evaluate: {len(beir.queries)} queries over {len(beir.corpus)} documents")
    unjudged = beir.queries.keys() - beir.qrels.keys()
    if unjudged:
        raise UserError(
            f"{len(unjudged)} of {len(beir.queries)} queries have no relevance judgement, the first is "
            f"{min(unjudged)}; give them one in the qrels or leave them out of the queries"
        )


# Fields of mteb's TaskMetadata that it wants to be given.
_UNSTATED = (
    *("reference", "date", "domains", "task_subtypes", "license", "annotations_creators", "dialect"),
    *("sample_creation", "bibtex_citation"),
)


def _figures(
    found: dict[str, dict[str, float]], beir: Beir, digest: str, kind: str, ignore_identical_ids: bool
) -> dict[str, Any]:
    """What mteb's retrieval task says about a search that found this, and about each query of it."""
    per_query: list[dict[str, Any]] = []
    with mteb_imported():
        from datasets import Dataset
        from mteb._evaluators.retrieval_metrics import mrr
        from mteb.abstasks import AbsTaskRetrieval
        from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

        class Search:
            mteb_model_meta = model_meta(digest, kind)

            def index(self, corpus: Any, **_: Any) -> None:
                pass

            def search(self, queries: Any, **_: Any) -> dict[str, dict[str, float]]:
                return {query: dict(found[query]) for query in queries["id"]}

        class LocalRetrieval(AbsTaskRetrieval):
            k_values = (1, 10)  # mteb needs 1
            metadata = task_metadata("Retrieval", METRICS[0])

            def load_data(self, *_: Any, **__: Any) -> None:
                data = RetrievalSplitData(
                    corpus=Dataset.from_dict({"id": []}),  # the search has it
                    queries=Dataset.from_dict({"id": list(beir.queries)}),
                    relevant_docs={query: beir.qrels[query] for query in beir.queries},
                    top_ranked=None,
                )
                self.dataset = {"default": {"test": data}}
                self.data_loaded = True

            def task_specific_scores(
                self, scores: dict[str, Any], qrels: Any, results: Any, *_: Any, **__: Any
            ) -> dict[str, float]:
                # A query that is not scored would leave the means instead of counting as a failure.
                assert scores.keys() == beir.queries.keys(), (
                    f"{len(scores)} of {len(beir.queries)} queries scored"
                )
                reciprocal = dict(zip(results, mrr(qrels, results, self.k_values)["MRR@10"], strict=True))
                for query in beir.queries:
                    figures = (scores[query]["ndcg_cut_10"], scores[query]["recall_10"], reciprocal[query])
                    best = sorted(results[query], key=lambda i: (results[query][i], i), reverse=True)[:10]
                    row = {"id": query, **dict(zip(METRICS, figures, strict=True)), "found": best}
                    per_query.append({**row, "scores": [results[query][i] for i in best]})
                return {}

        task = LocalRetrieval()
        task.ignore_identical_ids = ignore_identical_ids
        figures = task.evaluate(Search(), "test", encode_kwargs={})["default"]
        return {**{metric: float(figures[metric]) for metric in METRICS}, "per_query": per_query}


def task_metadata(kind: str, main_score: str) -> Any:
    """mteb's description of a task of this type on data that is only here."""
    from mteb.abstasks.task_metadata import TaskMetadata

    return TaskMetadata(
        name=f"Local{kind}",
        description="Texts of a folder.",
        type=kind,
        main_score=main_score,
        dataset={"path": "local", "revision": "local"},
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],  # a required field that nothing here depends on
        **dict.fromkeys(_UNSTATED),
    )


def model_meta(digest: str, kind: str) -> Any:
    """mteb's description of a model; the digest as revision tells two checkpoints apart."""
    from mteb.models import ModelMeta

    similarity = "cosine" if kind == "dense" else None
    values = {
        "name": "local/model",
        "revision": digest,
        "similarity_fn_name": similarity,
        "model_type": [kind],
    }
    return ModelMeta.create_empty(overwrites=values)


@contextmanager
def mteb_imported() -> Iterator[None]:
    """mteb without side effects: it asks the hub, seeds every global generator, draws bars."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the first import of huggingface_hub, which reads it once
    import torch

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        import datasets
        import mteb  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"evaluation needs {error.name}: pip install 'nemo_embed_core[eval]'") from None

    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            datasets.enable_progress_bar()
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
