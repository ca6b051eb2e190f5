"""No row lost, none doubled, the same at any world size; documents drawn without replacement, keyed by seed,
epoch, row."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from nemo_embed_core.data.sampler import OneSourceSampler, Part, Sampler, choose_documents
from nemo_embed_core.errors import UserError

PRIME = 101


@pytest.mark.parametrize("batch", [1, 4, 7, 100, PRIME])
def test_after_n_epochs_every_row_came_exactly_n_times(batch):
    sampler = Sampler(PRIME, batch, seed=3)
    epochs = 5
    drawn = np.concatenate([sampler.rows(step) for step in range(-(-epochs * PRIME // batch))])
    belongs = np.concatenate([sampler.epochs(step) for step in range(-(-epochs * PRIME // batch))])
    assert Counter(drawn[: epochs * PRIME].tolist()) == dict.fromkeys(range(PRIME), epochs)
    for epoch in range(epochs):
        assert sorted(drawn[belongs == epoch].tolist()) == list(range(PRIME))


@pytest.mark.fault(10)
def test_a_step_depends_on_nothing_but_the_seed():
    forward = Sampler(PRIME, 30, seed=0)
    rows = {step: forward.rows(step).tolist() for step in range(12)}
    backward = Sampler(PRIME, 30, seed=0)
    assert {step: backward.rows(step).tolist() for step in reversed(range(12))} == rows
    assert Sampler(PRIME, 30, seed=0).rows(7).tolist() == rows[7], "resumed in the middle"
    assert Sampler(PRIME, 30, seed=1).rows(7).tolist() != rows[7]
    assert Sampler(PRIME, 30, seed=-1).rows(0).tolist() != rows[0]
    # The stream of rows does not depend on the batch: a run may resume with another global batch at a common
    # multiple.
    longer = Sampler(PRIME, 60, seed=0)
    assert longer.rows(2).tolist() == rows[4] + rows[5]


def test_epochs_are_shuffled_differently():
    sampler = Sampler(PRIME, PRIME, seed=0)
    first, second = sampler.rows(0), sampler.rows(1)
    assert (first != np.arange(PRIME)).sum() > 80 and (first != second).sum() > 80
    assert [set(sampler.epochs(step)) for step in range(3)] == [{0}, {1}, {2}]


def test_batch_that_spans_the_end_of_an_epoch():
    sampler = Sampler(10, 4, seed=0)
    assert sampler.epochs(2).tolist() == [0, 0, 1, 1]
    assert sorted(np.concatenate([sampler.rows(0), sampler.rows(1), sampler.rows(2)[:2]]).tolist()) == list(
        range(10)
    )


def test_order_is_pinned():
    """A change here breaks the resume of every running job: old checkpoints hold a step, not rows."""
    assert Sampler(10, 10, seed=0).rows(0).tolist() == GOLDEN_0
    assert Sampler(10, 10, seed=7).rows(3).tolist() == GOLDEN_7
    mixed = Sampler([Part(np.arange(4), 6), Part(np.arange(4, 8), 3)], 9, seed=2)
    assert [mixed.rows(step).tolist() for step in (0, 1)] == GOLDEN_MIX
    single = OneSourceSampler(mixed.parts, 4, seed=2)
    assert [single.rows(step).tolist() for step in range(5)] == GOLDEN_SINGLE
    ids = choose_documents(STORE, np.array([0, 1, 2]), np.array([0, 0, 1]), 3, seed=5)
    assert ids.tolist() == GOLDEN_IDS


def test_fewer_rows_than_a_batch():
    with pytest.raises(
        UserError,
        match=r"global_batch_size=8 is more than the data has rows, 7: lower global_batch_size to at most 7",
    ):
        Sampler(7, 8, seed=0)


# ------------------------------------------------------------------------------------------ several datasets

# Rows of each, and draws in an epoch: once each, two and a half times, half of them, nearly twice.
MIX = [(7, 7), (10, 25), (4, 2), (5, 9)]


def mix() -> list[Part]:
    firsts = np.cumsum([0] + [count for count, _ in MIX])
    return [
        Part(np.arange(first, first + count), draws)
        for first, (count, draws) in zip(firsts, MIX, strict=False)
    ]


@pytest.mark.parametrize("batch", [1, 8, 43])
def test_an_epoch_has_exactly_the_draws_of_each_dataset(batch):
    sampler, epochs = Sampler(mix(), batch, seed=3), 6
    drawn = [(sampler.rows(step), sampler.epochs(step)) for step in range(-(-epochs * 43 // batch))]
    rows, passes = (np.concatenate(found)[: epochs * 43] for found in zip(*drawn, strict=True))
    for part in mix():
        counts: Counter[int] = Counter()
        for epoch in range(epochs):
            here = slice(epoch * 43, (epoch + 1) * 43)
            own = [
                (int(row), int(number))
                for row, number in zip(rows[here], passes[here], strict=True)
                if row in part.rows
            ]
            assert len(own) == part.draws, (epoch, part)
            before = Counter(counts)
            counts.update(row for row, _ in own)
            times = [counts[row] for row in part.rows.tolist()]
            assert max(times) - min(times) <= 1, f"epoch {epoch}: a row comes twice more than another one"
            # The passes of a row are numbered without a gap, whatever the order within the epoch.
            for row in part.rows.tolist():
                numbers = sorted(number for own_row, number in own if own_row == row)
                assert numbers == list(range(before[row], counts[row]))


def test_rows_of_a_shared_pass_are_drawn_by_the_seed_and_the_dataset():
    """Of half of 1,000 rows another half by each seed, by each part, and the other half in the next epoch."""

    def first_half(part: int, seed: int, epoch: int = 0) -> set[int]:
        parts = [Part(np.arange(1000) + 1000 * i, 500) for i in range(2)]
        rows = Sampler(parts, 1000, seed).rows(epoch)
        return {int(row) % 1000 for row in rows if row // 1000 == part}

    base = first_half(0, 5)
    assert first_half(0, 5, 1) == set(range(1000)) - base
    for other in (first_half(1, 5), first_half(0, 6), first_half(0, 5, 2)):
        assert len(other) == 500 and 200 < len(base & other) < 300
    assert 200 < len(base & set(range(500))) < 300


def test_datasets_that_are_drawn_once_an_epoch_are_one():
    """So a run that was begun before they could be weighted goes on with its rows."""
    parts = [Part(np.array([0, 3, 4]), 3), Part(np.array([], np.int64), 0), Part(np.arange(7, 30), 23)]
    whole = Sampler(np.concatenate([part.rows for part in parts]), 4, seed=11)
    mixed = Sampler(parts, 4, seed=11)
    for step in range(20):
        assert mixed.rows(step).tolist() == whole.rows(step).tolist()
        assert mixed.epochs(step).tolist() == whole.epochs(step).tolist()


@pytest.mark.parametrize("batch", [1, 4, 5])
def test_batches_of_one_dataset_take_it_pass_by_pass_and_in_exact_proportion(batch):
    parts, epochs = [Part(np.array([], np.int64), 0), *mix()], 5
    sampler = OneSourceSampler(parts[:3] + parts[4:], batch, seed=3)
    sizes = {7: 7, 10: 25, 5: 9}  # of 7, 10 and 5 rows
    batches: dict[int, list[np.ndarray]] = {count: [] for count in sizes}
    numbers: dict[int, list[np.ndarray]] = {count: [] for count in sizes}
    step, mixed = 0, []
    for epoch in range(1, epochs + 1):
        mixed.append([])
        while step < sampler.steps(epoch):
            rows = sampler.rows(step)
            (count,) = {7 if row < 7 else 10 if row < 17 else 5 for row in rows.tolist()}
            batches[count].append(rows)
            numbers[count].append(sampler.epochs(step))
            mixed[-1].append(count)
            step += 1
        for count, draws in sizes.items():
            done = -(-epoch * draws // batch)
            assert len(batches[count]) == done, f"epoch {epoch}: {done * batch - epoch * draws} draws ahead"
    for count, first in ((7, 0), (10, 7), (5, 21)):
        drawn, passes = np.concatenate(batches[count]), np.concatenate(numbers[count])
        assert passes.tolist() == [i // count for i in range(len(drawn))]
        orders = [tuple(drawn[i : i + count]) for i in range(0, len(drawn) - count + 1, count)]
        assert all(sorted(order) == list(range(first, first + count)) for order in orders)
        assert len(set(orders)) > 1
    assert all(found != sorted(found) and found != mixed[0] for found in mixed[1:])
    again = OneSourceSampler(parts[:3] + parts[4:], batch, seed=3)
    for late in (step - 1, 2, step // 2):
        (count,) = {7 if row < 7 else 10 if row < 17 else 5 for row in again.rows(late).tolist()}
        assert any(again.rows(late).tolist() == rows.tolist() for rows in batches[count])


def test_steps_of_an_epoch_leave_no_row_out():
    assert [Sampler(PRIME, 25, 0).steps(epochs) for epochs in (1, 2, 25)] == [5, 9, 101]
    assert Sampler(4_309_502, 128, 0).steps(1) == 33_668, "the second stage of arXiv:2511.07025"
    parts = [Part(np.arange(9), 10), Part(np.arange(9, 20), 3)]
    assert [OneSourceSampler(parts, 4, 0).steps(epochs) for epochs in (1, 2, 3, 4)] == [4, 7, 11, 13]


def test_a_dataset_smaller_than_a_batch_of_its_own_is_refused_by_name():
    parts = [Part(np.arange(9), 9), Part(np.arange(9, 12), 30, "small")]
    with pytest.raises(UserError, match=r"small has 3 rows to draw, fewer than global_batch_size=4"):
        OneSourceSampler(parts, 4, 0)
    OneSourceSampler(parts, 3, 0)


# ------------------------------------------------------------------------------------------ documents


def fake_store(positives: list[list[int]], negatives: list[list[int]]):
    def csr(lists):
        return np.cumsum([0] + [len(x) for x in lists]), np.array([i for x in lists for i in x], np.int64)

    (po, pi), (no, ni) = csr(positives), csr(negatives)
    return SimpleNamespace(positive_offsets=po, positive_ids=pi, negative_offsets=no, negative_ids=ni)


STORE = fake_store(positives=[[0], [1, 2, 3], [4, 5]], negatives=[[10, 11, 12, 13, 14, 15], [], [20, 21]])

GOLDEN_0 = [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
GOLDEN_7 = [2, 5, 9, 7, 3, 0, 6, 8, 4, 1]
GOLDEN_MIX = [[1, 2, 0, 7, 3, 1, 2, 6, 4], [0, 7, 0, 5, 3, 3, 5, 1, 2]]
GOLDEN_SINGLE = [[2, 1, 3, 0], [2, 1, 0, 3], [7, 6, 4, 5], [2, 0, 3, 1], [7, 5, 6, 4]]
GOLDEN_IDS = [[0, 14, 11, 12], [2, -1, -1, -1], [4, 21, 20, -1]]


@pytest.mark.parametrize("K", [0, 1, 2, 6, 9])
def test_documents_are_the_rows_own_without_repeats_and_missing_ones_last(K):
    own_pos = [{0}, {1, 2, 3}, {4, 5}]
    own_neg = [{10, 11, 12, 13, 14, 15}, set(), {20, 21}]
    for epoch in range(30):
        rows = np.array([2, 0, 1, 0])
        ids = choose_documents(STORE, rows, np.full(4, epoch), K, seed=0)
        assert ids.shape == (4, 1 + K) and ids.dtype == np.int64
        for row, line in zip(rows.tolist(), ids.tolist(), strict=True):
            assert line[0] in own_pos[row]
            given = [i for i in line[1:] if i >= 0]
            assert len(given) == min(K, len(own_neg[row])) and line[1 + len(given) :] == [-1] * (
                K - len(given)
            )
            assert len(set(given)) == len(given) and set(given) <= own_neg[row]
        assert ids[1].tolist() == ids[3].tolist(), "the same row in the same epoch"


@pytest.mark.fault(10)
def test_a_rows_documents_do_not_depend_on_the_batch():
    whole = choose_documents(STORE, np.array([0, 1, 2]), np.array([4, 4, 4]), 3, seed=1)
    for row in range(3):
        alone = choose_documents(STORE, np.array([row]), np.array([4]), 3, seed=1)
        assert alone[0].tolist() == whole[row].tolist()


def test_documents_change_with_epoch_row_and_seed():
    store = fake_store([[0]] * 50, [list(range(100, 120))] * 50)
    rows, zeros = np.arange(50), np.zeros(50, np.int64)
    base = choose_documents(store, rows, zeros, 5, seed=0)
    assert len({tuple(line) for line in base.tolist()}) == 50, "rows with equal lists draw independently"
    assert (choose_documents(store, rows, zeros + 1, 5, seed=0) != base).any(1).all()
    assert (choose_documents(store, rows, zeros, 5, seed=1) != base).any(1).all()


def test_draws_are_uniform():
    """Every negative at every place, every positive, and every pair equally often, within 5 standard
    deviations."""
    n = 6000
    store = fake_store([[1, 2, 3]] * n, [[10, 11, 12, 13, 14]] * n)
    ids = choose_documents(store, np.arange(n), np.zeros(n, np.int64), 2, seed=9)
    counts = [*Counter(ids[:, 0].tolist()).values()]
    for share, values in ((1 / 3, counts), *((1 / 5, Counter(ids[:, k].tolist()).values()) for k in (1, 2))):
        assert len(values) == round(1 / share)
        assert all(abs(count - n * share) < 5 * (n * share) ** 0.5 for count in values), values
    pairs = Counter(map(tuple, ids[:, 1:].tolist()))
    assert len(pairs) == 20 and all(abs(count - n / 20) < 5 * (n / 20) ** 0.5 for count in pairs.values())
    with_positive = Counter(zip(ids[:, 0].tolist(), ids[:, 1].tolist(), strict=True))
    assert all(abs(count - n / 15) < 5 * (n / 15) ** 0.5 for count in with_positive.values()), (
        "drawn independently"
    )


@pytest.mark.parametrize("K", [1, 2, 4, 5, 9])
def test_negatives_are_the_first_ones_or_take_turns(K):
    rows, n = np.array([0, 1, 2, 0]), {0: 6, 1: 0, 2: 2}
    own = [[10, 11, 12, 13, 14, 15], [], [20, 21]]
    turns: list[Counter[int]] = [Counter() for _ in own]
    for epoch in range(6):
        passes = np.array([epoch, epoch, epoch, epoch + 1])
        first = choose_documents(STORE, rows, passes, K, seed=4, negatives="first")
        turn = choose_documents(STORE, rows, passes, K, seed=4, negatives="rotate")
        drawn = choose_documents(STORE, rows, passes, K, seed=4)
        assert first[:, 0].tolist() == turn[:, 0].tolist() == drawn[:, 0].tolist(), "positives are drawn"
        for b, row in enumerate(rows.tolist()):
            missing = [-1] * (K - min(K, n[row]))
            assert first[b, 1:].tolist() == own[row][:K] + missing
            given = [own[row][(passes[b] * K + k) % n[row]] for k in range(min(K, n[row]))]
            assert turn[b, 1:].tolist() == given + missing
            if b < 3:
                turns[row].update(given)
    assert all(turns[row] == dict.fromkeys(own[row], 6 * min(K, n[row]) / n[row]) for row in (0, 2))


def test_no_negatives_at_all():
    store = fake_store([[0], [1]], [[], []])
    assert choose_documents(store, np.array([1, 0]), np.array([0, 0]), 2, 0).tolist() == [
        [1, -1, -1],
        [0, -1, -1],
    ]
