"""Groups stay whole, bins hold at most max_tokens, every rank gets equal counts, and the tensors point at the
right text."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nemo_embed_core.config import DataConfig, LossConfig
from nemo_embed_core.data.bins import plan, split_over_ranks
from nemo_embed_core.data.packing import MicroBatch, PackedBatch, build_micro_batch, load_batch, pack_texts
from nemo_embed_core.data.sampler import Sampler, choose_documents
from nemo_embed_core.data.shapes import Most, most_of
from nemo_embed_core.errors import UserError

CONFIG = DataConfig(num_hard_negatives=3, max_tokens=600)


def group_tokens(count: int, passages: int = 5, seed: int = 0) -> np.ndarray:
    """Tokens of a query and its passages: log-normal passages around 100 tokens, cut at 512, as real corpora
    have."""
    rng = np.random.default_rng(seed)
    return np.minimum(np.exp(rng.normal(4.6, 0.8, (count, passages))).astype(np.int64) + 4, 512).sum(1) + 20


class FakeStore(SimpleNamespace):
    """Every text's tokens say whose they are: [owner] * length."""

    def query_tokens(self, row):
        return np.full(self.query_lengths[row], 10_000 + row, np.int32)

    def document_tokens(self, doc_id):
        return np.full(self.document_lengths[doc_id], 20_000 + doc_id, np.int32)

    def scores(self, rows, doc_ids):
        """None of a teacher."""

    def __len__(self):
        return len(self.query_lengths)


def fake_store(rows: int = 97, documents: int = 150, seed: int = 0) -> FakeStore:
    rng = np.random.default_rng(seed)
    negatives = [rng.choice(documents, rng.integers(0, 6), replace=False) for _ in range(rows)]
    groups = rng.permutation(
        np.concatenate([np.arange(rows - 30), rng.integers(0, rows - 30, 30)])
    )  # some share a query
    same_as = np.arange(documents)
    same_as[100:110] = same_as[90:100]  # the same text in another spelling
    known = [np.unique(same_as[rng.choice(documents, rng.integers(1, 40))]) for _ in range(rows - 30)]
    return FakeStore(
        row_groups=groups,
        row_classes=None,
        row_grades=None,
        same_as=same_as,
        known_offsets=np.cumsum([0] + [len(k) for k in known]),
        known_ids=np.concatenate(known),
        query_lengths=rng.integers(2, 30, rows).astype(np.int32),
        document_lengths=rng.integers(2, 120, documents).astype(np.int32),
        positive_offsets=np.arange(rows + 1),
        positive_ids=rng.integers(0, documents, rows),
        negative_offsets=np.cumsum([0] + [len(n) for n in negatives]),
        negative_ids=np.concatenate(negatives).astype(np.int64),
    )


# ------------------------------------------------------------------------------------------ ranks and bins


@pytest.mark.parametrize("dp_size", [1, 2, 3, 8, 24])
def test_ranks_get_equal_counts_and_even_tokens(dp_size):
    tokens = group_tokens(24 * 20)
    parts = split_over_ranks(tokens, dp_size)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(tokens)))
    assert {len(part) for part in parts} == {len(tokens) // dp_size}
    loads = [int(tokens[part].sum()) for part in parts]
    assert max(loads) <= 1.01 * np.mean(loads), "in order of arrival the spread is several percent"
    assert all((a == b).all() for a, b in zip(parts, split_over_ranks(tokens, dp_size), strict=True))


def test_ranks_that_do_not_divide_the_batch():
    with pytest.raises(
        UserError, match=r"global_batch_size=10 is not a multiple of the 4 .* ranks; use 8 or 12"
    ):
        split_over_ranks(np.ones(10, np.int64), 4)


@pytest.mark.parametrize("seed", range(20))
def test_plan_keeps_groups_whole_within_capacity_and_counts_equal(seed):
    rng = np.random.default_rng(seed)
    ranks, count = int(rng.integers(1, 6)), int(rng.integers(1, 40))
    # Ranks differ in their sizes.
    tokens = [rng.integers(1, rng.integers(2, 1000), count) for _ in range(ranks)]
    max_tokens = int(max(t.max() for t in tokens)) + int(rng.integers(0, 500))
    plans = plan(tokens, max_tokens)
    assert len({len(bins) for bins in plans}) == 1
    for rank_tokens, bins in zip(tokens, plans, strict=True):
        assert sorted(np.concatenate(bins).tolist()) == list(range(count)), "every group once, whole"
        loads = [int(rank_tokens[bin_].sum()) for bin_ in bins]
        assert min(len(bin_) for bin_ in bins) > 0 and max(loads) <= max_tokens
        assert loads == sorted(loads, reverse=True), "fullest first"
    least = max(-(-int(r.sum()) // max_tokens) for r in tokens)
    assert len(plans[0]) >= least
    # At most one bin of a rank that was not split is half empty, else two of them would be one.
    assert len(plans[0]) <= max(2 * int(r.sum()) / max_tokens for r in tokens) + 1


def test_ranks_that_need_fewer_bins_split_theirs():
    plans = plan([np.full(4, 100), np.array([1, 1, 1, 1])], 100)
    assert [sorted(bin_.tolist() for bin_ in bins) for bins in plans] == [[[0], [1], [2], [3]]] * 2
    plans = plan([np.array([60, 60, 60, 1]), np.array([50, 40, 30, 10])], 130)
    assert [len(bins) for bins in plans] == [2, 2]
    assert sorted(int(np.array([50, 40, 30, 10])[bin_].sum()) for bin_ in plans[1]) == [60, 70], (
        "split evenly"
    )


def test_best_fit_fills_bins_exactly_where_it_can():
    tokens = np.array([70, 60, 50, 50, 40, 30])
    assert sorted(int(tokens[bin_].sum()) for bin_ in plan([tokens], 100)[0]) == [100, 100, 100]
    tokens = np.array([60, 50, 40, 25, 25])  # 40 beside 60: in the emptier bin it would cost a third one
    assert sorted(int(tokens[bin_].sum()) for bin_ in plan([tokens], 100)[0]) == [100, 100]


@pytest.mark.parametrize(
    ("passages", "max_tokens", "density"), [(5, 8192, 0.98), (2, 8192, 0.99), (5, 4096, 0.95)]
)
def test_density_on_realistic_lengths(passages, max_tokens, density):
    """2,048 groups on 8 ranks; a padded batch of the same texts is less than half full."""
    tokens = group_tokens(2048, passages)
    (bins,) = plan([tokens], max_tokens)
    assert tokens.sum() / (len(bins) * max_tokens) > density
    parts = split_over_ranks(tokens, 8)
    plans = plan([tokens[part] for part in parts], max_tokens)
    fewest = -(-int(max(tokens[part].sum() for part in parts)) // max_tokens)
    assert len(plans[0]) <= fewest + 1, "on every rank at most one micro-batch more than tokens / max_tokens"


@pytest.mark.parametrize("seed", range(3))
def test_large_steps_have_as_few_micro_batches_as_their_tokens_need(seed):
    """Best-fit decreasing makes 354, 349 and 354 of the first, one more than needed of the ranks. Where no
    fewer can be filled (three of 60 into two of 100), as many stay."""
    assert [len(bin_) for bin_ in plan([np.array([60, 60, 60])], 100)[0]] == [1, 1, 1]
    tokens = group_tokens(4096, seed=seed)
    (bins,) = plan([tokens], 8192)
    assert len(bins) == (352, 348, 353)[seed]
    assert tokens.sum() / (len(bins) * 8192) > 0.9965
    ranks = [group_tokens(1024, seed=seed + rank) for rank in (2, 3, 4, 5)]
    plans, fullest = plan(ranks, 8192), max(int(tokens.sum()) for tokens in ranks)
    assert len(plans[0]) == -(-fullest // 8192) and {len(bins) for bins in plans} == {len(plans[0])}
    for rank_tokens, bins in zip(ranks, plans, strict=True):
        assert sorted(np.concatenate(bins).tolist()) == list(range(1024))
        assert max(int(rank_tokens[bin_].sum()) for bin_ in bins) <= 8192


def test_group_larger_than_a_micro_batch():
    with pytest.raises(
        UserError, match=r"group 1 have 101 tokens together, more than max_tokens=100; raise data.max_tokens"
    ):
        plan([np.array([5, 101])], 100)


# ------------------------------------------------------------------------------------------ tensors


def check_packed(batch: PackedBatch, pad_to_multiple: int) -> None:
    T, cu = len(batch.input_ids), batch.cu_seqlens.tolist()
    assert T == cu[-1] == sum(batch.lengths) and cu[0] == 0 and T % pad_to_multiple == 0
    assert (
        batch.cu_seqlens.dtype == torch.int32
        and batch.input_ids.dtype == batch.position_ids.dtype == torch.int64
    )
    assert torch.diff(batch.cu_seqlens).tolist() == list(batch.lengths)
    real = batch.lengths[: batch.num_sequences]
    assert list(real) == sorted(real) and sum(real) == batch.num_tokens
    assert len(batch.lengths) - batch.num_sequences == int(batch.num_tokens < T)
    assert T - batch.num_tokens < pad_to_multiple and batch.max_seqlen == max(batch.lengths)
    positions = [i for length in batch.lengths for i in range(length)]
    assert batch.position_ids.tolist() == positions


def sequence(batch: PackedBatch, index: int) -> list[int]:
    return batch.input_ids[batch.cu_seqlens[index] : batch.cu_seqlens[index + 1]].tolist()


def check_micro_batch(batch: MicroBatch, store: FakeStore, pad_to_multiple: int) -> None:
    check_packed(batch, pad_to_multiple)
    b, columns = batch.document_ids.shape
    assert batch.query_index.shape == (b,) and batch.document_index.shape == batch.document_mask.shape == (
        b,
        columns,
    )
    assert max(batch.query_index.max(), batch.document_index.max()) < batch.num_sequences, (
        "the dummy is never indexed"
    )
    assert (batch.document_mask == (batch.document_ids >= 0)).all()
    assert (batch.document_index[~batch.document_mask] == 0).all()
    for i, row in enumerate(batch.rows.tolist()):
        assert sequence(batch, batch.query_index[i]) == store.query_tokens(row).tolist()
        for k in range(columns):
            if batch.document_mask[i, k]:
                doc_id = sequence(batch, batch.document_index[i, k])[0] - 20_000
                assert sequence(batch, batch.document_index[i, k]) == store.document_tokens(doc_id).tolist()
                assert batch.document_ids[i, k] == store.same_as[doc_id]
    unique = batch.document_index[batch.document_mask].unique()
    assert batch.num_sequences == b + len(unique), "a document is encoded once, and nothing else is"


@pytest.mark.parametrize("pad_to_multiple", [1, 2, 8])
def test_micro_batch_points_at_the_right_sequences(pad_to_multiple):
    store = fake_store()
    rows = np.array([5, 9, 5, 80, 3])
    doc_ids = choose_documents(store, rows, np.zeros(5, np.int64), 4, seed=0)
    assert (doc_ids == -1).any(), "missing negatives are part of the test"
    check_micro_batch(build_micro_batch(store, rows, doc_ids, pad_to_multiple), store, pad_to_multiple)


def test_a_document_of_several_groups_is_encoded_once():
    store = fake_store()
    doc_ids = np.array([[7, 8, -1], [7, 9, 8], [9, 7, -1]])
    batch = build_micro_batch(store, np.array([0, 1, 2]), doc_ids)
    check_micro_batch(batch, store, 1)
    assert batch.num_sequences == 3 + 3
    assert batch.document_index[0, 0] == batch.document_index[1, 0] == batch.document_index[2, 1]
    expected = store.query_lengths[:3].sum() + store.document_lengths[[7, 8, 9]].sum()
    assert batch.num_tokens == expected


def test_dummy_sequence_only_when_needed():
    store = fake_store()
    store.query_lengths[:2], store.document_lengths[:2] = 5, 11
    even = build_micro_batch(store, np.array([0, 1]), np.array([[0], [1]]), 8)
    assert len(even.input_ids) == 32 and even.num_sequences == len(even.lengths) == 4
    odd = build_micro_batch(store, np.array([0, 1]), np.array([[0], [1]]), 5)
    assert len(odd.input_ids) == 35 and odd.lengths == (5, 5, 11, 11, 3) and odd.num_sequences == 4


def test_to_moves_every_tensor_and_nothing_else():
    batch = build_micro_batch(fake_store(), np.array([0, 1]), np.array([[0], [1]]))
    moved = batch.to("meta")
    assert type(moved) is MicroBatch and moved.lengths == batch.lengths
    tensors = [name for name, value in vars(moved).items() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 8 and all(getattr(moved, name).device.type == "meta" for name in tensors)
    assert batch.to("cpu") is batch


# ------------------------------------------------------------------------------------------ a step


@pytest.mark.parametrize(("dp_size", "pad_to_multiple"), [(1, 1), (2, 1), (4, 4), (16, 2)])
def test_ranks_share_a_step_exactly(dp_size, pad_to_multiple):
    store = fake_store()
    sampler = Sampler(len(store), 32, seed=1)
    for step in (0, 3):  # step 3 spans the end of an epoch
        ranks = [
            load_batch(store, sampler, step, rank, dp_size, CONFIG, pad_to_multiple, seed=1)
            for rank in range(dp_size)
        ]
        assert len({len(batches) for batches, _ in ranks}) == 1, "every rank runs as many micro-batches"
        assert len({sum(len(m.query_index) for m in batches) for batches, _ in ranks}) == 1
        everything = [m for batches, _ in ranks for m in batches]
        assert sorted(row for m in everything for row in m.rows.tolist()) == sorted(
            sampler.rows(step).tolist()
        )
        for m in everything:
            check_micro_batch(m, store, pad_to_multiple)
            assert len(m.input_ids) <= CONFIG.max_tokens, "padding included"
        assert {total for _, total in ranks} == {sum(m.num_tokens for m in everything)}


def test_documents_of_a_row_are_the_same_at_any_world_size():
    store = fake_store()
    sampler = Sampler(len(store), 32, seed=1)

    def documents(dp_size):
        batches = [
            m for r in range(dp_size) for m in load_batch(store, sampler, 1, r, dp_size, CONFIG, 1, 7)[0]
        ]
        return {
            row: ids
            for m in batches
            for row, ids in zip(m.rows.tolist(), m.document_ids.tolist(), strict=True)
        }

    assert documents(1) == documents(2) == documents(8)
    rows = sampler.rows(1)
    chosen = choose_documents(store, rows, sampler.epochs(1), CONFIG.num_hard_negatives, seed=7)
    same = np.where(chosen >= 0, store.same_as[chosen], -1)
    assert documents(1) == dict(zip(rows.tolist(), same.tolist(), strict=True)), (
        "and they are keyed by the seed"
    )


@pytest.mark.parametrize("dp_size", [1, 4])
def test_a_row_is_told_of_all_that_it_knows_in_the_global_batch(dp_size):
    store = fake_store()
    sampler = Sampler(len(store), 32, seed=1)
    batches = [m for r in range(dp_size) for m in load_batch(store, sampler, 0, r, dp_size, CONFIG, 1, 7)[0]]
    present = {i for m in batches for i in m.document_ids.flatten().tolist()} - {-1}
    assert len({m.known_ids.shape[1] for m in batches}) == 1, "one width in all micro-batches of all ranks"
    most = 0
    for m in batches:
        for row, own, known in zip(
            m.rows.tolist(), m.document_ids[:, 0].tolist(), m.known_ids.tolist(), strict=True
        ):
            group = store.row_groups[row]
            right = set(store.known_ids[store.known_offsets[group] : store.known_offsets[group + 1]].tolist())
            expected = sorted((right & present) - {own}, reverse=True)
            assert known == expected + [-2] * (len(known) - len(expected))
            most = max(most, len(expected))
    assert most == len(known) >= 5


@pytest.mark.parametrize(
    ("dp_size", "pad", "few_shapes", "max_tokens"),
    [(1, 1, False, 600), (2, 4, False, 602), (4, 7, True, 600), (16, 2, False, 600)],
)
def test_the_most_of_all_steps_is_the_most_of_their_tensors(dp_size, pad, few_shapes, max_tokens):
    """Over three epochs, in three parts as ranks share them; and what is run for it has exactly that."""
    store, config = fake_store(), replace(CONFIG, max_tokens=max_tokens)
    sampler = Sampler(len(store), 32, seed=1)
    parts = [range(1, 4), range(4, 4), range(4, 10)]
    most = Most.of(most_of(store, sampler, part, dp_size, config, pad, 5, few_shapes) for part in parts)
    steps = [
        [load_batch(store, sampler, step, r, dp_size, config, pad, 5, few_shapes)[0] for r in range(dp_size)]
        for step in range(1, 10)
    ]
    all_batches = [m for ranks in steps for batches in ranks for m in batches]
    assert most == Most(
        tokens=max(len(m.input_ids) for m in all_batches),
        sequences=max(len(m.cu_seqlens) - 1 for m in all_batches),
        longest=max(m.max_seqlen for m in all_batches),
        queries=max(len(m.query_index) for m in all_batches),
        micro_batches=max(len(batches) for ranks in steps for batches in ranks),
    )
    for has_in_batch, queries in ((False, most.queries), (True, {1: 16, 2: 8, 4: 4, 16: 2}[dp_size])):
        shapes = most.step(4, has_in_batch, 32 // dp_size)
        assert len(shapes) == (2 if dp_size < 16 else 1)
        plain, loss = LossConfig(), LossConfig(kl_weight=1.0, cosent_weight=1.0)
        assert shapes[0].tensors(plain).grades is shapes[0].tensors(plain).teacher_scores is None
        for made in (shape.tensors(loss) for shape in shapes):
            assert made.grades is not None and made.grades.shape == (queries,)
            assert made.teacher_scores is not None and made.teacher_scores.shape == (queries, 4)
            assert (len(made.input_ids), len(made.cu_seqlens) - 1) == (most.tokens, most.sequences)
            assert made.max_seqlen == most.longest == int(made.cu_seqlens.diff().max())
            assert tuple(made.cu_seqlens.diff().tolist()) == made.lengths and min(made.lengths) > 0
            starts = made.cu_seqlens[:-1].repeat_interleave(made.cu_seqlens.diff())
            assert torch.equal(made.position_ids, torch.arange(most.tokens) - starts)
            assert made.document_index.shape == (queries, 4) and len(made.query_index) == queries
            assert int(made.document_index.max()) < most.sequences and made.document_mask.all()


def test_nothing_known_is_no_column():
    store = fake_store()
    store.known_offsets[:] = 0
    assert build_micro_batch(store, np.array([0, 1]), np.array([[0], [1]])).known_ids.shape == (2, 0)


def test_row_that_does_not_fit_is_named():
    store = fake_store()
    store.query_lengths[11] = 590
    sampler = Sampler(len(store), len(store), seed=0)
    with pytest.raises(
        UserError, match=r"row 11 of the store .* more than data\.max_tokens=600 .*: 600\); raise data"
    ):
        load_batch(store, sampler, 0, 0, 1, replace(CONFIG, num_hard_negatives=5))


# ------------------------------------------------------------------------------------------ texts alone


@pytest.mark.parametrize("pad_to_multiple", [1, 8])
def test_pack_texts_covers_every_text_once(pad_to_multiple):
    rng = np.random.default_rng(0)
    texts = [np.full(length, i, np.int32) for i, length in enumerate(rng.integers(1, 100, 200))]
    seen: list[int] = []
    capacity = tokens = 0
    for indices, batch in pack_texts(texts, 500, pad_to_multiple):
        check_packed(batch, pad_to_multiple)
        assert len(batch.input_ids) <= 500 and batch.num_sequences == len(indices)
        for j, i in enumerate(indices.tolist()):
            assert sequence(batch, j) == texts[i].tolist()
        seen += indices.tolist()
        capacity, tokens = capacity + 500, tokens + batch.num_tokens
    assert sorted(seen) == list(range(200))
    assert tokens / capacity > 0.85


def test_pack_texts_edges():
    assert list(pack_texts([], 10)) == []
    (indices, batch), *rest = pack_texts([np.arange(10, dtype=np.int32)], 10)
    assert indices.tolist() == [0] and batch.num_tokens == 10 and not rest
    with pytest.raises(UserError, match=r"text 1 has 11 tokens, more than max_tokens=10"):
        list(pack_texts([np.arange(3), np.arange(11)], 10))
    with pytest.raises(
        UserError, match=r"text 0 has 10 tokens, more than max_tokens=10 \(in whole multiples of 4: 8\)"
    ):
        list(pack_texts([np.arange(10)], 10, 4))
    with pytest.raises(UserError, match="max_tokens=3 is less than the 4"):
        list(pack_texts([np.arange(2)], 3, 4))
