"""Retrieval quality of models side by side on one held-out BEIR folder.

python launch/evaluate.py --models runs/stage1 exports/merged bm25 --data data/wiki --split test --output report.json
"""

import json
import time
from pathlib import Path

from nemo_embed_core.config import EvaluateConfig, UserError, load_config, user_errors


def main() -> None:
    config = load_config(EvaluateConfig)
    with user_errors():
        evaluate(config)


def evaluate(config: EvaluateConfig) -> None:
    from nemo_embed_core.data.readers import Beir, Findings, read_beir
    from nemo_embed_core.evaluation.retrieval import METRICS, evaluate_bm25, evaluate_retrieval, mteb_imported

    check(config)
    findings = Findings()
    beir = read_beir(config.data, config.split, config.on_missing, findings)
    findings.raise_bad()
    for line in findings.lines():
        print(line, flush=True)
    if config.max_queries:
        beir = Beir(beir.corpus, dict(list(beir.queries.items())[: config.max_queries]), beir.qrels)
    sizes = f"{len(beir.queries)} queries of split {config.split}, {len(beir.corpus)} documents"
    print(f"{sizes} of {config.data}", flush=True)
    with mteb_imported():
        pass  # seconds below are of encoding and search, not of imports
    lengths = {"query_max_length": config.query_max_length, "document_max_length": config.document_max_length}
    width = max(len(model) for model in (*config.models, "model"))
    print(f"{'model':{width}}  ndcg@10  recall@10  mrr@10  seconds", flush=True)
    report = {}
    for model in config.models:
        encoder = load_encoder(model, config)
        start = time.perf_counter()
        scores = evaluate_retrieval(encoder, beir, config.task, **lengths) if encoder else evaluate_bm25(beir)
        seconds = time.perf_counter() - start
        del encoder  # before the next one is loaded
        ndcg, recall, mrr = (scores[metric] for metric in METRICS)
        print(f"{model:{width}}  {ndcg:7.4f}  {recall:9.4f}  {mrr:6.4f}  {seconds:7.1f}", flush=True)
        report[model] = {**scores, "seconds": round(seconds, 1)}
        if config.output:  # after every model: an hour of scores is not lost with the next one
            Path(config.output).parent.mkdir(parents=True, exist_ok=True)
            Path(config.output).write_text(json.dumps(report, indent=2) + "\n")


def check(config: EvaluateConfig) -> None:
    """Everything that can be wrong with the models' names, before the first hour of encoding."""
    if not config.models:
        raise UserError('no models to evaluate: give checkpoints, runs or folders, or "bm25"')
    if len(set(config.models)) < len(config.models):
        raise UserError(f"models={config.models} names one twice; the report has one entry per name")
    for model in config.models:
        if model != "bm25" and not Path(model).is_dir():
            raise UserError(f'model {model} is not a folder; give a checkpoint, a run, a Hugging Face folder or "bm25"')


def load_encoder(model: str, config: EvaluateConfig):
    """Ours for a checkpoint, a run, a Llama folder or an export; sentence-transformers for its other folders; None: bm25."""
    if model == "bm25":
        return None
    from nemo_embed_core.checkpoint.source import resolve

    if resolve(model).kind == "sentence-transformers":
        from nemo_embed_core.evaluation.encoders import SentenceTransformerEncoder

        return SentenceTransformerEncoder(model, config.device, config.precision)
    from nemo_embed_core.embedder import Embedder

    return Embedder.load(model, config.device, config.precision, config.max_tokens)


if __name__ == "__main__":
    main()
