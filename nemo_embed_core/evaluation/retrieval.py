"""nDCG@10, recall@10 and MRR@10 through mteb's own retrieval task and evaluator, from data in memory, offline.

mteb takes 4 seconds to import, so it is imported inside. The task is run directly instead of through `mteb.evaluate`:
that one keeps results by model name and revision, and serves two local checkpoints one another's scores.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_embed_core.config import UserError
from nemo_embed_core.data.prompts import query_prompt
from nemo_embed_core.data.readers import Beir
from nemo_embed_core.evaluation.bm25 import Bm25
from nemo_embed_core.evaluation.encoders import Encoder, SentenceTransformerEncoder

if TYPE_CHECKING:
    from mteb.models import SearchProtocol

METRICS = ("ndcg_at_10", "recall_at_10", "mrr_at_10")
CUTS = (1, 10, 100)  # mteb needs 1; the search keeps 100 so that ties around rank 10 are all there to be broken by id

MAX_SCORES = 64 << 20  # fp32 query-document scores held at a time, 256 MB


def evaluate_retrieval(
    encoder: Encoder, beir: Beir, task: str = "", *, query_max_length: int = 512, document_max_length: int = 512
) -> dict[str, float]:
    """{"ndcg_at_10", "recall_at_10", "mrr_at_10"} of exact search by cosine, means over the queries.

    task: instruction of the queries, "Instruct: {task}\\nQuery: {text}"; "": the query as it is. Documents are raw. A
    sentence-transformers folder with a query prompt of its own keeps its prompts instead. Lengths in tokens.
    """
    _check(beir)
    with mteb_imported():
        from mteb.models import SearchEncoderWrapper
        from mteb.models.abs_encoder import AbsEncoder
        from mteb.types import PromptType

        prompt = {"query": query_prompt(task), "document": ""}
        if isinstance(encoder, SentenceTransformerEncoder) and "query" in encoder.prompts:
            prompt |= encoder.prompts
        prompts = {PromptType.query: prompt["query"], PromptType.document: prompt["document"]}
        lengths = {PromptType.query: query_max_length, PromptType.document: document_max_length}

        class Adapter(AbsEncoder):
            def __init__(self) -> None:
                self.mteb_model_meta = _model_meta(encoder.digest, "dense")

            def encode(self, inputs: Any, *, prompt_type: PromptType, **_: Any) -> np.ndarray:
                # All texts at once and not by mteb's batches: the encoder sorts and packs them better.
                texts = [text for batch in inputs for text in batch["text"]]
                vectors = encoder.encode(texts, prompt=prompts[prompt_type], max_length=lengths[prompt_type])
                assert len(vectors) == len(texts), f"{len(texts)} texts, {len(vectors)} embeddings"
                bad = ~np.isfinite(vectors).all(axis=1)
                if bad.any():  # NaN would be sorted to the top
                    raise UserError(
                        f"{bad.sum()} of {len(texts)} {prompt_type.value} embeddings have NaN or infinite values, the first "
                        f"for {texts[int(bad.argmax())][:60]!r}; the weights are broken, take an earlier checkpoint"
                    )
                return vectors

        chunk = min(50_000, max(1_000, MAX_SCORES // len(beir.queries)))
        return _scores(SearchEncoderWrapper(Adapter(), corpus_chunk_size=chunk), beir)


def evaluate_bm25(beir: Beir, k1: float = 1.2, b: float = 0.75) -> dict[str, float]:
    """The same figures, from the same evaluator, for words instead of vectors."""
    _check(beir)
    with mteb_imported():

        class Search:
            mteb_model_meta = _model_meta(f"k1={k1}-b={b}", "sparse")

            def index(self, corpus: Any, **_: Any) -> None:
                self.ids = list(corpus["id"])
                self.bm25 = Bm25(corpus["text"], k1, b)

            def search(self, queries: Any, *, top_k: int, **_: Any) -> dict[str, dict[str, float]]:
                found = self.bm25.top(queries["text"], top_k)
                return {
                    query: {self.ids[i]: float(score) for i, score in zip(*best, strict=True)}
                    for query, best in zip(queries["id"], found, strict=True)
                }

        return _scores(Search(), beir)


def _check(beir: Beir) -> None:
    if not beir.queries or not beir.corpus:
        raise UserError(f"nothing to evaluate: {len(beir.queries)} queries over {len(beir.corpus)} documents")
    unjudged = beir.queries.keys() - beir.qrels.keys()
    if unjudged:
        raise UserError(
            f"{len(unjudged)} of {len(beir.queries)} queries have no relevance judgement, the first is {min(unjudged)}; "
            f"give them one in the qrels or leave them out of the queries"
        )


def _scores(search_model: SearchProtocol, beir: Beir) -> dict[str, float]:
    from datasets import Dataset
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata

    class LocalRetrieval(AbsTaskRetrieval):
        k_values = CUTS
        metadata = TaskMetadata(
            name="LocalRetrieval",
            description="Queries and documents handed over in memory.",
            type="Retrieval",
            main_score=METRICS[0],
            dataset={"path": "local", "revision": "local"},
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],  # a required field that nothing here depends on
            reference=None,
            date=None,
            domains=None,
            task_subtypes=None,
            license=None,
            annotations_creators=None,
            dialect=None,
            sample_creation=None,
            bibtex_citation=None,
        )

        def load_data(self, *_: Any, **__: Any) -> None:
            self.dataset = {
                "default": {
                    "test": RetrievalSplitData(
                        corpus=Dataset.from_dict({"id": list(beir.corpus), "text": list(beir.corpus.values())}),
                        queries=Dataset.from_dict({"id": list(beir.queries), "text": list(beir.queries.values())}),
                        relevant_docs={query: beir.qrels[query] for query in beir.queries},
                        top_ranked=None,
                    )
                }
            }
            self.data_loaded = True

        def task_specific_scores(self, scores: dict[str, Any], *_: Any, **__: Any) -> dict[str, float]:
            # A query that is not scored would leave the means instead of counting as a failure.
            assert scores.keys() == beir.queries.keys(), f"{len(scores)} of {len(beir.queries)} queries scored"
            return {}

    encode_kwargs = {"batch_size": 1024, "show_progress_bar": False}
    scores = LocalRetrieval().evaluate(search_model, "test", encode_kwargs=encode_kwargs)["default"]
    return {metric: float(scores[metric]) for metric in METRICS}


def _model_meta(digest: str, kind: str) -> Any:
    """mteb's description of a model. The digest as revision tells two checkpoints apart wherever mteb writes results."""
    from mteb.models import ModelMeta

    return ModelMeta(
        loader=None,
        name="local/model",
        revision=digest,
        release_date=None,
        languages=None,
        n_parameters=None,
        memory_usage_mb=None,
        max_tokens=None,
        embed_dim=None,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=[],
        similarity_fn_name="cosine" if kind == "dense" else None,
        use_instructions=None,
        training_datasets=None,
        model_type=[kind],
    )


@contextmanager
def mteb_imported() -> Iterator[None]:
    """mteb without its side effects: it asks the hub, seeds every global generator (at import too), draws bars."""
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
