"""Rows that cannot be packed or have no candidate are found at the start; what is drawn is bounded for every
epoch."""

import json
from dataclasses import replace

import numpy as np
import pytest

from nemo_embed_core.config import DataConfig, DatasetConfig
from nemo_embed_core.data.build import open_store
from nemo_embed_core.data.packing import load_batch
from nemo_embed_core.data.population import longest_draws, population
from nemo_embed_core.data.sampler import Sampler, choose_documents
from nemo_embed_core.errors import UserError


def words(count: int, seed: int) -> str:
    return " ".join(f"w{(seed * 7 + i) % 97}" for i in range(count))


ROWS = [
    {"query": f"question number {i}", "pos": [words(5, i), words(30 if i == 3 else 6, i + 1)],
     "neg": [words(4 + (i * j) % 9 + (40 if (i, j) in ((5, 2), (9, 0), (9, 4)) else 0),
                     i + j + 50) for j in range(i % 6)]}
    for i in range(12)
]  # fmt: skip


@pytest.fixture
def config(tmp_path) -> DataConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return DataConfig(
        datasets=[DatasetConfig(path=str(path), task="Find")], cache_dir=str(tmp_path / "cache"),
        query_max_length=64, document_max_length=256, num_hard_negatives=2, max_tokens=180,
    )  # fmt: skip


@pytest.fixture
def store(config, tokenizer):
    return open_store(config, tokenizer, log=lambda message: None)


def draws(store, K, epochs=40):
    rows = np.arange(len(store))
    for epoch in range(epochs):
        documents = choose_documents(store, rows, np.full(len(rows), epoch), K, seed=1)
        yield store.query_lengths + np.where(documents >= 0, store.document_lengths[documents], 0).sum(1)


@pytest.mark.parametrize("K", [0, 1, 2, 4, 9])
def test_the_bound_of_the_first_negatives_is_theirs(store, config, K):
    rows = np.arange(len(store))
    documents = choose_documents(store, rows, np.zeros(len(rows), np.int64), K, 1, "first")[:, 1:]
    tokens = store.query_lengths + np.where(documents >= 0, store.document_lengths[documents], 0).sum(1)
    longest = [store.document_lengths[store.positives(row)].max() for row in rows]
    bound = longest_draws(store, K, "first")
    assert bound.tolist() == (tokens + longest).tolist()
    assert K not in (1, 2) or (bound < longest_draws(store, K)).any()
    first = replace(config, num_hard_negatives=K, negatives="first", max_tokens=int(bound.max()))
    population(store, first, True)
    with pytest.raises(UserError, match=f"longest positive and {K} first negatives"):
        population(store, replace(first, max_tokens=int(bound.max()) - 1), True)
    before = store.document_lengths.copy()
    long = [row for row in rows.tolist() if bound[row] > 150]
    small = replace(first, max_tokens=150, on_long_row="truncate")
    population(store, small, True, log=lambda message: None)
    assert longest_draws(store, K, "first").max() <= 150
    drawn = {int(d) for row in long for d in (*store.positives(row), *store.negatives(row)[:K])}
    assert {*np.flatnonzero(store.document_lengths < before).tolist()} <= drawn


@pytest.mark.parametrize("K", [0, 1, 2, 4, 9])
def test_the_bound_is_the_longest_draw(store, K):
    bound = longest_draws(store, K)
    seen = np.max(list(draws(store, K)), axis=0)
    assert (seen <= bound).all() and (seen == bound).sum() >= 10
    for row in range(len(store)):
        negatives = sorted(store.document_lengths[store.negatives(row)], reverse=True)[:K]
        assert bound[row] == store.query_lengths[row] + store.document_lengths[
            store.positives(row)
        ].max() + sum(negatives)


def test_long_rows_are_named_before_the_first_step(store, config):
    long = np.flatnonzero(longest_draws(store, 2) > 180).tolist()
    assert 9 in long and 0 < len(long) < 6
    with pytest.raises(UserError) as caught:
        population(store, config, True)
    message = str(caught.value)
    for row in long:
        assert f"rows.jsonl:{row + 1}: {longest_draws(store, 2)[row]} tokens" in message
    assert f"{len(long)} of 12 rows" in message and f"at least {longest_draws(store, 2).max()}" in message
    everything = population(store, replace(config, max_tokens=int(longest_draws(store, 2).max())), True)
    assert everything.rows.tolist() == list(range(12)) and everything.digest == ""
    with pytest.raises(UserError, match="can have more than"):  # equal slices for 7 ranks: fewer tokens fit
        population(store, replace(config, max_tokens=int(longest_draws(store, 2).max())), True, 7)


def test_drop_leaves_long_rows_out_of_every_epoch(store, config):
    lines: list[str] = []
    config = replace(config, on_long_row="drop")
    drawn = population(store, config, True, log=lines.append)
    long = np.flatnonzero(longest_draws(store, 2) > 180)
    assert drawn.rows.tolist() == sorted(set(range(12)) - set(long.tolist()))
    assert f"{len(long)} of 12 rows" in lines[0] and f"rows.jsonl:{long[0] + 1}" in lines[0]
    sampler = Sampler(drawn.rows, 3, seed=5)
    n = len(drawn.rows)
    for epoch in range(3):  # exact epochs of the rows that are left
        stream = np.concatenate([sampler.rows(step) for step in range(n)])[epoch * n : (epoch + 1) * n]
        assert sorted(stream.tolist()) == drawn.rows.tolist()
    for step in range(30):
        load_batch(store, sampler, step, 0, 1, config, seed=5)
    with pytest.raises(UserError, match="leaves none"):
        population(store, replace(config, max_tokens=20), True, log=lines.append)


def test_truncate_makes_every_draw_fit_and_takes_no_more_than_needed(store, config):
    before = store.document_lengths.copy()
    bound = longest_draws(store, 2)
    lines: list[str] = []
    drawn = population(store, replace(config, on_long_row="truncate"), True, log=lines.append)
    assert drawn.rows.tolist() == list(range(12)) and drawn.digest
    after = longest_draws(store, 2)
    assert after.max() <= 180 and max(np.max(list(draws(store, 2)), axis=0)) <= 180
    shorter = np.flatnonzero(store.document_lengths < before)
    assert f"{len(shorter)} longest documents" in lines[0]
    long_rows = np.flatnonzero(bound > 180).tolist()
    assert set(shorter.tolist()) <= {
        int(d) for r in long_rows for d in (*store.positives(r), *store.negatives(r))
    }
    assert (after[long_rows] > 180 - 3).all(), "one token more for each document would not fit"
    for doc in shorter.tolist():
        whole = type(store)(store.folder).document_tokens(doc)
        assert store.document_tokens(doc).tolist() == whole[: store.document_lengths[doc]].tolist()
    again = type(store)(store.folder)
    assert (
        population(again, replace(config, on_long_row="truncate"), True, log=lines.append).digest
        == drawn.digest
    )
    assert (again.document_lengths == store.document_lengths).all()
    with pytest.raises(UserError, match=r"rows\.jsonl:\d+: the query of .* too few to shorten them to"):
        population(type(store)(store.folder), replace(config, on_long_row="truncate", max_tokens=45), True)


def test_documents_that_truncation_makes_equal_are_no_negatives_of_each_other(tmp_path, tokenizer):
    """Three documents with one beginning: two of one row, cut to one length, one of another row."""
    long = words(60, 1)
    rows = [
        {"query": "first question", "pos": [long + " alpha beta"], "neg": [long + " gamma", words(5, 9)]},
        {"query": "second question", "pos": [long + " delta"], "neg": [words(6, 20)]},
        {"query": "third question", "pos": [words(8, 30)], "neg": [words(7, 40)]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(
        datasets=[DatasetConfig(path=str(path))], cache_dir=str(tmp_path / "cache"), query_max_length=64,
        document_max_length=256, num_hard_negatives=2, max_tokens=110, on_long_row="truncate",
    )  # fmt: skip
    store, lines = open_store(config, tokenizer, log=lambda message: None), []
    alpha, gamma, delta = int(store.positives(0)[0]), int(store.negatives(0)[0]), int(store.positives(1)[0])
    assert len({*store.same_as[[alpha, gamma, delta]].tolist()}) == 3
    population(store, config, True, log=lines.append)
    lengths = store.document_lengths[[alpha, gamma, delta]]
    assert lengths[0] == lengths[1] < lengths[2], "one cap for a row, another one for another row"
    equal = store.document_tokens(alpha).tolist() == store.document_tokens(gamma).tolist()
    assert equal and store.same_as[alpha] == store.same_as[gamma] != store.same_as[delta]
    assert "no negatives of it: 1" in lines[0]
    assert store.same_as[alpha] in store.known_positives(0) and len(store.known_positives(0)) == 1
    (batch,), _ = load_batch(store, Sampler(3, 3, seed=1), 0, 0, 1, replace(config, max_tokens=900))
    ids = dict(zip(batch.rows.tolist(), batch.document_ids.tolist(), strict=True))
    assert ids[0].count(ids[0][0]) == 2, "the negative has the id of the positive, so the loss masks it"


def test_a_query_that_is_a_shortened_document_knows_it(tmp_path, tokenizer):
    query = words(30, 1)
    rows = [
        {"query": "the first question", "pos": [words(60, 1)], "neg": []},
        {"query": query, "pos": ["w1"], "neg": []},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fits = sum(map(len, tokenizer.encode(["the first question", query], 256)))
    config = DataConfig(
        datasets=[DatasetConfig(path=str(path))], cache_dir=str(tmp_path / "cache"), query_max_length=256,
        document_max_length=256, max_tokens=fits, on_long_row="truncate",
    )  # fmt: skip
    store = open_store(config, tokenizer, log=lambda message: None)
    doc, own = int(store.positives(0)[0]), int(store.positives(1)[0])
    assert store.known_positives(1).tolist() == [own]
    population(store, config, True, log=lambda message: None)
    assert store.document_tokens(doc).tolist() == store.query_tokens(1).tolist()
    assert store.known_positives(0).tolist() == [doc] and store.known_positives(1).tolist() == [doc, own]


def test_a_shortened_document_keeps_the_token_that_ends_it(store):
    store.manifest["end_tokens"] = [2]
    doc = int(store.document_lengths.argmax())
    whole = store.document_tokens(doc).tolist()
    store.document_lengths[doc] = 20
    assert store.document_tokens(doc).tolist() == [*whole[:19], 2]
    assert type(store)(store.folder).document_tokens(doc).tolist() == whole


def test_rows_without_negatives_are_not_drawn_without_in_batch_negatives(store, config):
    config = replace(config, max_tokens=9999)
    lines: list[str] = []
    drawn = population(store, config, False, log=lines.append)
    assert drawn.rows.tolist() == [i for i in range(12) if i % 6] and drawn.digest
    assert (
        "2 of 12 rows have no negative" in lines[0]
        and "rows.jsonl:1, " in lines[0]
        and "rows.jsonl:7)" in lines[0]
    )
    assert len(population(store, config, True).rows) == 12
    store.negative_offsets = np.zeros(13, np.int64)
    with pytest.raises(UserError, match="none of the 12 rows has a hard negative"):
        population(store, config, False)
