"""A teacher's scores on their way from rows of a file into batches: each stays with its text."""

import json
import random

import numpy as np
import pytest
from tiny import WORDS, train_config

from nemo_embed_core.config import DataConfig, DatasetConfig
from nemo_embed_core.data.build import open_store
from nemo_embed_core.data.packing import build_micro_batch
from nemo_embed_core.data.prepare import write_datasets
from nemo_embed_core.data.sampler import choose_documents
from nemo_embed_core.data.store import SCORES
from nemo_embed_core.errors import UserError
from nemo_embed_core.train.preflight import prepare


def written(path, field: str = "prompt"):
    """30 rows with 2 to 6 negatives, of which one is a positive of another row of the query; every third row
    has no scores."""
    rng, rows = random.Random(1), []
    for i in range(30):
        pos = [f"{rng.choice(WORDS)} right {i} {k}" for k in range(1 + i % 2)]
        neg = [f"{rng.choice(WORDS)} wrong {i} {k}" for k in range(rng.randint(2, 6))]
        if i % 4 == 1:
            neg.insert(1, rows[-1]["pos"][0])  # left out, as the query is that of the row before
        row = {"query": f"find {i - (i % 4 == 1)}", "pos": pos, "neg": neg, field: ""}
        if i % 5 == 0:
            neg.append(neg[0])  # once more, with another score: the first one counts
        if i % 3:
            row |= {"pos_scores": [rng.randrange(64) / 64 for _ in pos]}
            row |= {"neg_scores": [rng.randrange(64) / 64 for _ in neg]}
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.mark.parametrize("as_folder", [False, True])
def test_scores_stay_with_their_texts(tmp_path, tokenizer, as_folder: bool) -> None:
    rows = written(tmp_path / "rows.jsonl")  # FlagEmbedding's fields
    data = DataConfig(
        datasets=[DatasetConfig(path=str(tmp_path / "rows.jsonl"))], cache_dir=str(tmp_path / "cache"),
        num_hard_negatives=3,
    )  # fmt: skip
    if as_folder:
        data = write_datasets(data, str(tmp_path / "folder"), lambda line: None)
    lines: list[str] = []
    store = open_store(data, tokenizer, log=lines.append)
    assert (
        any("scores of a teacher: 20 rows" in line for line in lines) and store.manifest["scored_rows"] == 20
    )
    text_of = {
        tuple(tokenizer.encode([text], 512)[0].tolist()): text
        for row in rows
        for text in (*row["pos"], *row["neg"])
    }
    found = 0
    for epoch in range(3):
        numbers = np.random.default_rng(epoch).permutation(30)
        documents = choose_documents(store, numbers, np.full(30, epoch), 3, seed=4)
        batch = build_micro_batch(store, numbers, documents)
        assert batch.teacher_scores is not None and batch.teacher_scores.shape == (30, 4)
        for b, row in enumerate(rows[number] for number in numbers.tolist()):
            scores = row.get("pos_scores", []) + row.get("neg_scores", [])
            told = dict(
                reversed(list(zip(row["pos"] + row["neg"], scores, strict=False)))
            )  # the first counts
            for m, document in enumerate(documents[b].tolist()):
                score = batch.teacher_scores[b, m].item()
                if document < 0 or not told:
                    assert np.isnan(score)
                else:
                    assert score == told[text_of[tuple(store.document_tokens(document).tolist())]]
                    found += 1
    assert found > 150 and store.manifest["negatives_left_out"] == 8


def test_a_loss_that_needs_scores_says_what_is_missing(tmp_path, capsys) -> None:
    config = train_config(tmp_path, loss={"kl_weight": 1.0})
    with pytest.raises(UserError, match="no row has them: mine with it"):
        prepare(config)
    folder = next((tmp_path / "cache").glob("[0-9a-f]*"))
    assert not any((folder / name).exists() for name in SCORES)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest.pop("scored_rows") == 0
    (folder / "manifest.json").write_text(json.dumps(manifest))  # as stores were before
    with pytest.raises(UserError, match=r"built before stores kept a teacher's scores.*delete that folder"):
        prepare(config)
    prepare(train_config(tmp_path))


def test_the_document_of_a_graded_pair_may_be_wrong_for_its_query(tmp_path, tokenizer) -> None:
    """A pair of low grade takes a negative neither from the rows with its query nor from those of its
    class; what stands in a row's own positives, or is the query, is right by itself."""
    pairs = [("a cat sat", "a dog ran", 0.0), ("a cat sat", "a  Cat sat", 5.0), ("the sea", "the moon", 1.0)]
    lines = [{"sentence1": one, "sentence2": two, "score": grade} for one, two, grade in pairs]
    (tmp_path / "sts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    wrong = ["a dog ran", "the moon", "A cat sat"]
    row = {"query": "a cat sat", "pos": ["one sits"], "neg": wrong}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    datasets = [
        DatasetConfig(path=str(tmp_path / "sts.jsonl"), grades=True),
        DatasetConfig(path=str(tmp_path / "rows.jsonl")),
    ]
    store = open_store(DataConfig(datasets=datasets, cache_dir=str(tmp_path / "cache")), tokenizer)
    assert store.row_grades is not None and store.row_groups[0] == store.row_groups[3]
    text_of = {tuple(tokenizer.encode([text], 512)[0].tolist()): text for text in ["one sits", *wrong]}

    def texts(documents) -> list[str]:
        return [text_of.get(tuple(store.document_tokens(d).tolist()), "another") for d in documents.tolist()]

    assert texts(store.negatives(3)) == ["a dog ran", "the moon"]
    known = set(texts(store.known_positives(3)))
    assert "one sits" in known and not known & {"a dog ran", "the moon"}
