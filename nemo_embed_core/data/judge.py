"""A tokenised data set judged as a whole: equal documents, false negatives, rows that teach nothing.

Two documents are the same when their texts have one normal form (data/normal_form.py) or when their tokens
are equal after truncation, and so are two that are the same as a third. A negative that is the same as a
positive of its row, as a positive of another row with the same query, or as the query itself would be pushed
away although it is right: it is left out. So is a positive, or the query, of a row of the same class (group).
The document of a graded pair is no positive here.
All other kinds are counted and stay.

# R rows · D documents · P, N positives and negatives of all rows, end to end
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nemo_embed_core.data.normal_form import normal_key
from nemo_embed_core.data.sampler import splitmix64

EMPTY_KEY = normal_key("")  # of every text without content
OF_CLASS = "negatives left out, a positive or the query of a row of the same group"
NO_CLASS = bytes(16)  # of a row without a group
NAMED = 3  # rows of each kind that the report names


def judge(
    folder: Path, parts: list[tuple[str, int]]
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    """(arrays by file name, kind -> {"count", "of", "first": [path:line]}) from a build's .part files.

    parts: (file, rows of it), in order.
    """

    def ints(part: str) -> np.ndarray:
        return np.fromfile(folder / f"{part}.part", dtype="<i8").astype(np.int64, copy=False)

    def keys(part: str) -> np.ndarray:
        return np.fromfile(folder / f"{part}.part", dtype="<u8").reshape(-1, 2)

    positives_P, negatives_N = ints("positives"), ints("negatives")
    num_positives_R, num_negatives_R = ints("num_positives"), ints("num_negatives")
    document_rows_D, lines_R = ints("document_rows"), ints("row_lines")
    R, D = len(lines_R), len(document_rows_D)
    row_P, row_N = np.repeat(np.arange(R), num_positives_R), np.repeat(np.arange(R), num_negatives_R)
    grades_R = np.fromfile(folder / "row_grades.part", "<f4")

    # The queries stand behind the documents, so that a query finds the document that it is.
    text_all = _first_equal(np.concatenate([keys("document_keys"), keys("query_keys")]))
    token_all = _first_equal(np.concatenate([keys("document_hashes"), keys("query_hashes")]))
    text_D, token_D = text_all[:D], token_all[:D]
    same_D = closure(text_D, token_D)
    by_text_R, by_token_R = (np.where(first[D:] < D, first[D:], -1) for first in (text_all, token_all))
    _, group_R = np.unique(_first_equal(keys("group_keys")), return_inverse=True)

    # What is never a negative: pairs (group, document) as one number; classes are groups behind the others.
    # The document of a graded pair may be as wrong for its query as any other.
    is_right_P = np.isnan(grades_R)[row_P]
    rows, documents = [row_P[is_right_P]], [same_D[positives_P[is_right_P]]]
    for by_R in (by_text_R, by_token_R):
        rows.append(np.flatnonzero(by_R >= 0))
        documents.append(same_D[by_R[by_R >= 0]])
    row_K, document_K = np.concatenate(rows), np.concatenate(documents)
    num_groups = int(group_R.max()) + 1
    class_R, class_pairs = _classes(keys("class_keys"), row_K, document_K, num_groups, D)
    known_pairs = np.concatenate([np.unique(group_R[row_K] * D + document_K), class_pairs])
    known_offsets, known_ids = by_group(known_pairs, max(num_groups, int(class_R.max()) + 1), D)

    is_own_text_N = np.isin(row_N * D + text_D[negatives_N], row_P * D + text_D[positives_P])
    is_own_N = np.isin(row_N * D + same_D[negatives_N], row_P * D + same_D[positives_P])
    is_query_N = np.zeros(len(negatives_N), bool)
    is_query_P = np.zeros(len(positives_P), bool)
    for by_R in (by_text_R, by_token_R):
        same_R = np.where(by_R >= 0, same_D[by_R], -1)
        is_query_N |= same_D[negatives_N] == same_R[row_N]
        is_query_P |= same_D[positives_P] == same_R[row_P]
    is_sibling_N = np.isin(group_R[row_N] * D + same_D[negatives_N], known_pairs)
    is_class_N = class_R[row_N] >= 0
    is_class_N &= np.isin(class_R[row_N] * D + same_D[negatives_N], known_pairs)
    is_known_N = is_sibling_N | is_class_N
    kept_N = ~is_known_N
    kept_R = np.bincount(row_N[kept_N], minlength=R)

    N = len(negatives_N)
    is_sibling_N &= ~is_own_N & ~is_query_N
    is_class_N &= ~is_own_N & ~is_query_N & ~is_sibling_N
    lost_R = np.flatnonzero((num_negatives_R > 0) & (kept_R == 0))
    repeated_R = _repeats(group_R, same_D, positives_P, num_positives_R, negatives_N, num_negatives_R)
    empty = np.frombuffer(EMPTY_KEY, dtype="<u8")
    empty_R = np.flatnonzero((keys("query_keys") == empty).all(1))
    empty_D = document_rows_D[(keys("document_keys") == empty).all(1)]
    left, cut = "negatives left out", "after truncation"
    # kind -> (the row of each entry, out of how many)
    kinds = {
        "left out": (row_N[is_known_N], N),
        f"{left}, equal to a positive of the row up to case, spaces and spelling": (row_N[is_own_text_N], N),
        f"{left}, equal to a positive of the row {cut}": (row_N[is_own_N & ~is_own_text_N], N),
        f"{left}, equal to the query": (row_N[is_query_N & ~is_own_N], N),
        f"{left}, a positive of another row with the same query": (row_N[is_sibling_N], N),
        **({OF_CLASS: (row_N[is_class_N], N)} if len(class_pairs) else {}),
        "rows that lost all their negatives so": (lost_R, R),
        "rows whose query is a positive of theirs": (np.unique(row_P[is_query_P]), R),
        "rows that stand there already": (repeated_R, R),
        "queries without content (zero-width, control or unreadable characters)": (empty_R, R),
        "documents without content": (empty_D, D),
        f"queries with the tokens of a different query {cut}": (
            np.flatnonzero(_collide(token_all[D:], group_R)),
            R,
        ),
        f"documents with the tokens of a different document {cut}": (
            document_rows_D[_collide(token_D, text_D)],
            D,
        ),
    }
    part_ends = np.cumsum([count for _, count in parts])
    noise: dict[str, dict[str, Any]] = {}
    for kind, (rows, of) in kinds.items():
        first = np.unique(rows)[:NAMED]
        files = [parts[i][0] for i in np.searchsorted(part_ends, first, side="right").tolist()]
        named = [f"{file}:{line}" for file, line in zip(files, lines_R[first].tolist(), strict=True)]
        noise[kind] = {"count": len(rows), "of": of, "first": named}

    arrays = {
        "query_offsets.npy": _offsets(ints("query_lengths")),
        "document_offsets.npy": _offsets(ints("document_lengths")),
        "positive_offsets.npy": _offsets(num_positives_R),
        "positives.npy": positives_P,
        "negative_offsets.npy": _offsets(kept_R),
        "negatives.npy": negatives_N[kept_N],
        "row_lines.npy": lines_R,
        "same_as.npy": same_D,
        "row_groups.npy": group_R.astype(np.int64),
        "known_offsets.npy": known_offsets,
        "known.npy": known_ids,
        **({"row_classes.npy": class_R} if len(class_pairs) else {}),
    }
    scores_P, scores_N = (
        np.fromfile(folder / f"{side}_scores.part", "<f4") for side in ("positive", "negative")
    )
    if np.isfinite(grades_R).any():
        arrays["row_grades.npy"] = grades_R
    if np.isfinite(scores_P).any() and np.isfinite(scores_N).any():
        arrays |= {"positive_scores.npy": scores_P, "negative_scores.npy": scores_N[kept_N]}
    return arrays, noise


def _classes(
    keys_R: np.ndarray, row_K: np.ndarray, document_K: np.ndarray, num_groups: int, num_documents: int
) -> tuple[np.ndarray, np.ndarray]:
    """([R] the class of each row as a group from num_groups on, -1: none; ascending pairs class *
    num_documents + document).

    row_K, document_K: what each row knows to be right. A class of one document, as a label, tells its rows
    nothing that they do not know, and is none.
    """
    class_R = np.full(len(keys_R), -1)
    has_one = keys_R.any(1)
    _, class_R[has_one] = np.unique(_first_equal(keys_R[has_one]), return_inverse=True)
    class_K = class_R[row_K]
    pairs = np.unique((class_K * num_documents + document_K)[class_K >= 0])
    is_large = np.bincount(pairs // num_documents, minlength=1) > 1
    number = np.where(is_large, num_groups + np.cumsum(is_large) - 1, -1)
    class_R = np.where(class_R >= 0, number[class_R], -1)
    pairs = pairs[is_large[pairs // num_documents]]
    return class_R, number[pairs // num_documents] * num_documents + pairs % num_documents


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def by_group(pairs: np.ndarray, num_groups: int, num_documents: int) -> tuple[np.ndarray, np.ndarray]:
    """(known_offsets, known_ids) of the store from ascending pairs (group * num_documents + document)."""
    offsets = np.searchsorted(pairs, np.arange(num_groups + 1) * num_documents)
    return offsets.astype(np.int64), pairs % num_documents


def known_of(
    known_offsets: np.ndarray, known_ids: np.ndarray, groups_B: np.ndarray, present: np.ndarray
) -> np.ndarray:
    """[B, J]: of what a group (-1: none) knows the ids in `present`; -2 in empty places."""
    groups, group_B = np.unique(groups_B, return_inverse=True)
    starts = known_offsets[groups]
    sizes = np.where(groups < 0, 0, known_offsets[groups + 1] - starts)
    owner = np.repeat(np.arange(len(groups)), sizes)
    known = known_ids[starts[owner] + np.arange(len(owner)) - (np.cumsum(sizes) - sizes)[owner]]
    hit = np.isin(known, present)
    owner, known = owner[hit], known[hit]
    counts = np.bincount(owner, minlength=len(groups))
    known_GJ = np.full((len(groups), counts.max(initial=0)), -2, np.int64)
    known_GJ[owner, np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]] = known
    return known_GJ[group_B]


def _first_equal(keys: np.ndarray) -> np.ndarray:
    """[n]: the smallest index with the same key; keys [n, 2] uint64."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable
    is_new = np.ones(len(keys), bool)
    is_new[1:] = (keys[order[1:]] != keys[order[:-1]]).any(1)
    first = np.empty(len(keys), np.int64)
    first[order] = order[is_new][np.cumsum(is_new) - 1]
    return first


def closure(*firsts: np.ndarray) -> np.ndarray:
    """[n]: the smallest index that is reached over equal entries of any of `firsts`."""
    label = np.arange(len(firsts[0]))
    while True:
        before = label
        for first in firsts:
            smallest = label.copy()
            np.minimum.at(smallest, first, label)  # of each class, kept at its first member
            label = smallest[first]
        if np.array_equal(label, before):
            return label


def _collide(token: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Where another entry has the same tokens and a different text."""
    low, high = np.full(int(token.max()) + 1, np.iinfo(np.int64).max), np.full(int(token.max()) + 1, -1)
    np.minimum.at(low, token, text)
    np.maximum.at(high, token, text)
    return (low != high)[token]


def _repeats(
    group_R: np.ndarray, same_D: np.ndarray, positives: np.ndarray, num_positives: np.ndarray,
    negatives: np.ndarray, num_negatives: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Rows with the query, the positives and the negatives of an earlier row, in any order."""
    parts = [group_R.astype(np.uint64)]
    for ids, counts in ((positives, num_positives), (negatives, num_negatives)):
        sums = np.concatenate(
            [np.zeros(1, np.uint64), np.cumsum(splitmix64(same_D[ids].astype(np.uint64)), dtype=np.uint64)]
        )
        offsets = _offsets(counts)
        parts += [sums[offsets[1:]] - sums[offsets[:-1]], counts.astype(np.uint64)]
    _, first = np.unique(np.stack(parts, axis=1), axis=0, return_index=True)
    return np.setdiff1d(np.arange(len(group_R)), first)
