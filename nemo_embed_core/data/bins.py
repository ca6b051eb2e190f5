"""Which groups of a global batch go together: split over ranks by tokens, then into micro-batches.

A group is a query with its positive and hard negatives. Every rank computes the plan of all ranks from the
lengths alone, so all agree on the number of micro-batches without talking.
"""

from __future__ import annotations

import heapq

import numpy as np

from nemo_embed_core.errors import UserError

SWAPS, PARTNERS = 4, 8  # of levelling: swaps a bin, and emptiest bins that the fullest one asks


def split_over_ranks(tokens_B: np.ndarray, dp_size: int) -> list[np.ndarray]:
    """Positions in the global batch per dp rank: B / dp_size each, tokens as even as longest-first gets.

    The next longest group goes to the rank with the fewest tokens that still has room; ties to the lower
    rank.
    """
    B = len(tokens_B)
    if B % dp_size:
        raise UserError(
            f"global_batch_size={B} is not a multiple of the {dp_size} data-parallel ranks; "
            f"use {B // dp_size * dp_size or dp_size} or {(B // dp_size + 1) * dp_size}"
        )
    taken: list[list[int]] = [[] for _ in range(dp_size)]
    heap = [(0, rank) for rank in range(dp_size)]
    for position in np.argsort(-tokens_B.astype(np.int64), kind="stable").tolist():
        load, rank = heapq.heappop(heap)
        taken[rank].append(position)
        if len(taken[rank]) < B // dp_size:
            heapq.heappush(heap, (load + int(tokens_B[position]), rank))
    return [np.array(sorted(positions), dtype=np.int64) for positions in taken]


def plan(tokens_per_group_per_rank: list[np.ndarray], max_tokens: int) -> list[list[np.ndarray]]:
    """[rank][micro-batch] -> groups of that rank: at most max_tokens each, equally many bins on every rank.

    Best-fit decreasing on every rank; ranks that need fewer bins split their fullest ones. Where that takes
    more bins than the tokens of the fullest rank need, all ranks try to do with fewer, filled alike. Ranks
    must have the same number of groups (that makes the equal count always possible). Bins are
    ordered fullest first, so that ranks working on the same index have about the same work. Raises UserError
    when one group alone exceeds max_tokens.
    """
    assert len({len(tokens) for tokens in tokens_per_group_per_rank}) == 1, (
        "ranks have different numbers of groups"
    )
    bins = [_best_fit_decreasing(tokens, max_tokens) for tokens in tokens_per_group_per_rank]
    count = max(len(rank_bins) for rank_bins in bins)
    least = max(-(-int(tokens.sum()) // max_tokens) for tokens in tokens_per_group_per_rank)
    for fewer in range(least, count):
        if levelled := _all_levelled(tokens_per_group_per_rank, fewer, max_tokens):
            bins, count = levelled, fewer
            break
    out = []
    for tokens, rank_bins in zip(tokens_per_group_per_rank, bins, strict=True):
        loads = [int(tokens[bin_].sum()) for bin_ in rank_bins]
        while len(rank_bins) < count:
            fullest = max(
                (i for i in range(len(rank_bins)) if len(rank_bins[i]) > 1), key=lambda i: (loads[i], -i)
            )
            halves = _halve(tokens, rank_bins[fullest])
            rank_bins[fullest : fullest + 1] = halves
            loads[fullest : fullest + 1] = [int(tokens[half].sum()) for half in halves]
        order = sorted(range(count), key=lambda i: (-loads[i], i))
        out.append([np.array(sorted(rank_bins[i]), dtype=np.int64) for i in order])
    return out


def _best_fit_decreasing(tokens: np.ndarray, max_tokens: int) -> list[list[int]]:
    """Longest group first, each into the fullest bin that still has room for it."""
    if len(tokens) and int(tokens.max()) > max_tokens:
        group = int(tokens.argmax())
        raise UserError(
            f"the query and passages of group {group} have {int(tokens[group])} tokens together, more than "
            f"max_tokens={max_tokens}; raise data.max_tokens or lower the max_lengths or num_hard_negatives"
        )
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # free tokens -> bins with exactly that much room
    # Bit r is set when by_room[r] has a bin: the best fit is the lowest set bit at or above the length.
    rooms = 0
    order = np.argsort(-tokens.astype(np.int64), kind="stable")
    for group, length in zip(order.tolist(), tokens[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            index = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, index = max_tokens, len(bins)
            bins.append([])
        bins[index].append(group)
        left = room - length
        if left:
            by_room.setdefault(left, []).append(index)
            rooms |= 1 << left
    return bins


def _all_levelled(ranks: list[np.ndarray], count: int, max_tokens: int) -> list[list[list[int]]] | None:
    found = []
    for tokens in ranks:
        if (bins := _levelled(tokens, count, max_tokens)) is None:
            return None
        found.append(bins)
    return found


def _levelled(tokens: np.ndarray, count: int, max_tokens: int) -> list[list[int]] | None:
    """The groups in so many bins, as even as it takes for the fullest to have at most max_tokens; None where
    this does not find out how.

    Longest first into the emptiest bin; then the fullest bin swaps groups with one of the emptiest, the two
    that make both most alike, until all fit.
    """
    bins: list[list[int]] = [[] for _ in range(count)]
    heap, lengths = [(0, i) for i in range(count)], tokens.tolist()
    for group in np.argsort(-tokens.astype(np.int64), kind="stable").tolist():
        load, emptiest = heap[0]
        bins[emptiest].append(group)
        heapq.heapreplace(heap, (load + lengths[group], emptiest))
    loads = np.zeros(count, np.int64)
    for load, i in heap:
        loads[i] = load
    for _ in range(SWAPS * count):
        fullest = int(loads.argmax())
        if loads[fullest] <= max_tokens:
            return bins
        for other in np.argsort(loads, kind="stable")[:PARTNERS].tolist():
            gap = int(loads[fullest] - loads[other])
            more_FO = tokens[bins[fullest]].astype(np.int64)[:, None] - tokens[bins[other]]
            left_FO = np.abs(gap - 2 * more_FO)
            f, o = divmod(int(left_FO.argmin()), len(bins[other]))
            if left_FO[f, o] < gap:
                bins[fullest][f], bins[other][o] = bins[other][o], bins[fullest][f]
                loads[fullest] -= more_FO[f, o]
                loads[other] += more_FO[f, o]
                break
        else:
            return None
    return None


def _halve(tokens: np.ndarray, groups: list[int]) -> list[list[int]]:
    """Two non-empty parts of about equal tokens: longest first to the lighter part."""
    parts: list[list[int]] = [[], []]
    loads = [0, 0]
    for group in sorted(groups, key=lambda g: (-int(tokens[g]), g)):
        lighter = int(loads[1] < loads[0])
        parts[lighter].append(group)
        loads[lighter] += int(tokens[group])
    return parts
