"""The demo's whole path from a folder that transformers made, for a toy of each base model: train at tp=2,
mine, train on what was mined, merge two, check, evaluate."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Server
from tiny import WORDS, write_rows, write_tokenizer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from toy_evaluation import write_beir

SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512, "head_dim": 16,
    "initializer_range": 0.1,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
    "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
# model_type -> (what of SIZES is another, pooling and attention of the run)
BASES: dict[str, tuple[dict[str, Any], str, bool]] = {
    "qwen2": ({"tie_word_embeddings": True}, "mean", False),
    "qwen3": ({}, "last", True),
    "ministral3": ({"rope_parameters": YARN}, "mean", False),
    "mistral": ({"sliding_window": None}, "weightedmean", False),
}
QWEN_SPLIT = (  # of Qwen2Tokenizer, by whose rules transformers reads any tokenizer beside these model types
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def write_qwen_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS), "find nothing number Instruct Query"] * 5, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<|endoftext|>"}))


def launch(argv: list[str]) -> None:
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("name", BASES)
def test_a_base_model_goes_the_whole_way(name: str, server: Server, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    changes, pooling, causal = BASES[name]
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SIZES, **changes}))
    base.save_pretrained(tmp_path / "base")
    (write_qwen_tokenizer if name.startswith("qwen") else write_tokenizer)(tmp_path / "base")
    rows = [json.loads(line) for line in write_rows(tmp_path / "rows.jsonl").read_text().splitlines()]
    corpus = [{"_id": str(i), "text": row["pos"][0]} for i, row in enumerate(rows)]
    queries = [{"_id": str(i), "text": row["query"]} for i, row in enumerate(rows)]
    write_beir(tmp_path / "test", corpus, queries, [(str(i), str(i), 1) for i in range(len(rows))])

    def run(argv: list[Any], ranks: int = 0) -> str:
        words = [str(word) for word in argv]
        outcomes = server.run(launch, ranks, words) if ranks else [server.launch(words)]
        assert [outcome.code for outcome in outcomes] == [0] * len(outcomes), outcomes[0].output[-4000:]
        return outcomes[0].output

    def train(output: str, init_from: str, data: str, *options: Any, ranks: int = 2) -> list[float]:
        datasets = json.dumps([{"path": str(tmp_path / data), "task": "find it"}])
        argv = ["launch/train.py", "--init_from", tmp_path / init_from, "--output_dir", tmp_path / output]
        argv += ["--data.datasets", datasets, "--data.cache_dir", tmp_path / "cache", "--steps", "12"]
        argv += ["--device", "cpu", "--precision", "fp32", "--global_batch_size", "8", "--optim.lr", "2e-3"]
        argv += ["--data.query_max_length", "48", "--data.document_max_length", "48"]
        argv += ["--data.num_hard_negatives", "1", "--loss.in_batch", "all", "--loss.temperature", "0.05"]
        argv += ["--parallel.tp_size", ranks, "--model.pooling", pooling, "--log_every", "1"]
        argv += ["--model.is_causal", json.dumps(causal), *options]
        run(argv, ranks)
        lines = (tmp_path / output / "metrics.jsonl").read_text().splitlines()
        return [record["loss"] for record in map(json.loads, lines) if "loss" in record]

    losses = train("stage1", "base", "rows.jsonl", "--checkpoint.every", "6")
    assert len(losses) == 12 and sum(losses[-3:]) < 0.7 * sum(losses[:3])
    half = tmp_path / "stage1" / "step-00000006"
    moved = train("moved", "base", "rows.jsonl", "--checkpoint.resume", half, ranks=1)
    assert moved == pytest.approx(losses[6:], rel=1e-3)
    mine = ["launch/mine.py", "--config", "configs/mine-demo.yaml", "--model", tmp_path / "stage1"]
    run([*mine, "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "mined.jsonl"])
    mined = [json.loads(line) for line in (tmp_path / "mined.jsonl").read_text().splitlines()]
    assert sum(len(row["neg"]) for row in mined) > len(mined)
    for seed in ("1", "2"):
        train(f"stage2-{seed}", "stage1", "mined.jsonl", "--seed", seed, "--steps", "4", "--optim.lr", "2e-4")
    sources = [tmp_path / "stage2-1", tmp_path / "stage2-2"]
    run(["launch/merge.py", *sources, "--output", tmp_path / "merged"])
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["model_type"] == name and config["is_causal"] is causal
    out = run(["launch/merge.py", "--check", tmp_path / "merged"])
    assert f"attention: {'causal' if causal else 'bidirectional'} in 8 of 8 cases" in out
    assert "transformers, sentence-transformers, our encoder agree on" in out
    evaluate = ["launch/evaluate.py", "--config", "configs/evaluate-demo.yaml", "--data", tmp_path / "test"]
    evaluate += ["--output", tmp_path / "evaluation.json", "--models", tmp_path / "base", tmp_path / "merged"]
    run(evaluate)
    scores = json.loads((tmp_path / "evaluation.json").read_text())
    untrained, trained = (
        next(found["ndcg_at_10"] for model, found in scores.items() if model.endswith(end))
        for end in ("base", "merged")
    )
    assert trained > untrained + 0.1, scores
