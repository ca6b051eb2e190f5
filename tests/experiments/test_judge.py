"""Which mined negatives are relevant after all, by labels and by a cross-encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toy_evaluation import WORDS, word_tokenizer, write_beir

from nemo_embed_core.config import JudgeConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.experiments.judge import judge

ROWS: list[dict[str, Any]] = [
    {"query": "w0 w1", "pos": ["w2 w3"], "neg": ["w4 w5", "W6  w7.", "w8"]},  # w6 w7 in another spelling
    {"query": "w2", "pos": ["w9", "w3"], "neg": []},
    {"query": "w3", "pos": ["w1 w1", "w5 w8", "w12"], "neg": ["w6 w7", "w2 w3", "w13", "w14 w2"]},
]


@pytest.fixture
def mined(tmp_path) -> Path:
    path = tmp_path / "mined.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_labels_that_mining_was_not_given_count_its_false_negatives(tmp_path, mined):
    corpus = [
        {"_id": f"d{i}", "text": text} for i, text in enumerate(["w2 w3", "w6 w7", "w9", "w1 w1", "w4 w5"])
    ]
    queries = [{"_id": f"q{i}", "text": row["query"]} for i, row in enumerate(ROWS)]
    # Of the first query d1 is relevant too; d4 was judged and is not.
    judged = [("q0", "d0", 1), ("q0", "d1", 2), ("q0", "d4", 0), ("q1", "d2", 1), ("q2", "d3", 1)]
    labels = write_beir(tmp_path / "labels", corpus, queries, judged)
    found = judge(JudgeConfig(mined=str(mined), output=str(tmp_path / "j.json"), labels=str(labels)))
    assert found == {"rows": 3, "without": 1, "negatives": 7, "relevant": 1, "share": 1 / 7}
    assert json.loads((tmp_path / "j.json").read_text()) == found
    first = JudgeConfig(mined=str(mined), output=str(tmp_path / "j.json"), labels=str(labels), max_rows=1)
    assert judge(first)["share"] == pytest.approx(1 / 3)
    mined.write_text(json.dumps({**ROWS[0], "query": "w17"}) + "\n" + json.dumps(ROWS[1]) + "\n")
    with pytest.raises(UserError, match="1 of 2 mined queries have no judgements there, first 'w17'"):
        judge(JudgeConfig(mined=str(mined), output=str(tmp_path / "j.json"), labels=str(labels)))


def test_a_cross_encoder_calls_relevant_what_it_scores_like_a_positive(tmp_path, mined):
    import torch
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    torch.manual_seed(3)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(WORDS), num_labels=1, initializer_range=1.0, **shape)
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "cross")
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>"}
    PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(), **special).save_pretrained(tmp_path / "cross")

    def score(query: str, text: str) -> float:
        """Without sentence-transformers; both texts are of the first kind for this tokenizer."""
        words = ["<s>", *query.split(), *text.split()]
        ids = torch.tensor([[WORDS.index(w) if w in WORDS else WORDS.index("<unk>") for w in words]])
        with torch.no_grad():
            return float(model(ids).logits)

    expected = 0
    scores = [score("w3", text) for text in (*ROWS[2]["pos"], *ROWS[2]["neg"])]
    assert sum(s >= min(scores[:3]) for s in scores[3:]) > sum(s >= max(scores[:3]) for s in scores[3:])
    for row in ROWS:
        lowest = min(score(row["query"], text) for text in row["pos"])
        expected += sum(score(row["query"], text.replace("w7.", "w7 .")) >= lowest for text in row["neg"])
    options = {"mined": str(mined), "output": str(tmp_path / "j.json"), "device": "cpu"}
    found = judge(JudgeConfig(**options, cross_encoder=str(tmp_path / "cross")))
    assert found["relevant"] == expected and 0 < expected < 7 and found["negatives"] == 7
    with pytest.raises(UserError, match="give labels or cross_encoder"):
        JudgeConfig(**options)
