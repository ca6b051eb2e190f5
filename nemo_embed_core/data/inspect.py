"""A dataset looked at before it is trained on: counts, lengths, copies, leaks, packing, samples.

    report = inspect(config, tokenizer, store, against=["beir/nq", "data/msmarco:dev"])   # for JSON
    print_report(report); page(report)                                       # data/inspect_page.py

Lengths, truncation, packing and samples are those of the token store and of the code that trains; the texts
are read once more, for languages, scripts, copies and overlap. Memory: some 200 bytes for each distinct text
(its hash, its row, where it stands on disk), 4 for each score, and at most 16 MB for the near-duplicates of a
side of the data or of an evaluation set.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from nemo_embed_core.config import DataConfig
from nemo_embed_core.data.building import Log
from nemo_embed_core.data.compile import rows_of
from nemo_embed_core.data.lines import PROGRESS_S
from nemo_embed_core.data.near import CHARACTERS, NEAR, NearIndex, signer
from nemo_embed_core.data.overlap import Distinct, Overlap, evaluation_set, texts_of
from nemo_embed_core.data.packing import load_batch
from nemo_embed_core.data.population import longest_draws, population
from nemo_embed_core.data.readers import files_of, source_files
from nemo_embed_core.data.sampler import Sampler, choose_documents, sampler
from nemo_embed_core.data.statistics import quantiles, script
from nemo_embed_core.data.store import Store
from nemo_embed_core.data.texts import Texts, texts_in
from nemo_embed_core.data.tokenizer import Tokenizer
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.durable import probe_file, refuse_inputs

UNCUT = 1_000  # texts of a side that are tokenised whole
DRAWN = 8_192  # rows that are packed
STEPS = (16, 128, 1_024, 8_192)  # rows of a rank and step
PADDED = (4, 16)  # rows of a padded micro-batch
SHOWN = 4  # rows that are decoded
LENGTHS_AT = (0.0, 0.5, 0.9, 0.95, 0.99, 1.0)
NUM_BINS = 40
SEED = 0


def inspect(
    config: DataConfig, tokenizer: Tokenizer, store: Store, against: Iterable[str] = (), log: Log = print
) -> dict[str, Any]:
    """The report. UserError where the texts cannot be read, or are not those of the store."""
    with texts_in(config.cache_dir):
        return _inspect(config, tokenizer, store, against, log)


def _inspect(
    config: DataConfig, tokenizer: Tokenizer, store: Store, against: Iterable[str], log: Log
) -> dict[str, Any]:
    sign, m = signer(), store.manifest
    sets = {name: texts_of(name, log) for name in against}
    sides = {"queries": Distinct(), "documents": Distinct()}
    spoken, scores = _read(config, tokenizer, store, sides)
    near = {side: texts.near(sign) for side, texts in sides.items()}
    overlaps = [
        (name, side, Overlap(texts, sides[side], sign))
        for name, evaluation in sets.items()
        for side, texts in (("queries", evaluation.queries), ("documents", evaluation.corpus))
    ]
    for side, texts in sides.items():
        _show(side, texts.texts, sign, [near[side], *(o.near for _, of, o in overlaps if of == side)], log)
    lengths = {"queries": store.query_lengths, "documents": store.document_lengths}
    counted = ("path", "rows", "documents", "truncated_queries", "truncated_documents")
    counts = {"queries": len(store), "documents": store.num_documents}
    return {
        "sources": [
            {
                **{name: source[name] for name in counted if name in source},
                "query_max_length": at.query,
                "document_max_length": at.document,
            }
            for source, at in zip(m["sources"], store.max_lengths, strict=True)
        ],
        "store": store.digest,
        "settings": {
            **{name: m[name] for name in ("query_max_length", "document_max_length")},  # or a list, of each
            **{name: getattr(config, name) for name in ("num_hard_negatives", "max_tokens")},
        },
        "counts": {
            "rows": len(store),
            **{name: m[name] for name in ("documents", "positives", "negatives", "negatives_left_out")},
            **{name: m[name] for name in ("rows_without_negatives", "merged_repeats")},
        },
        "positives_per_row": _histogram_of_counts(store.positive_offsets),
        "negatives_per_row": _histogram_of_counts(store.negative_offsets),
        "tokens": {side: _lengths(values) for side, values in lengths.items()},
        "tokens_uncut": {side: _uncut(texts, tokenizer) for side, texts in sides.items()},
        "truncated": {
            side: {"count": m[f"truncated_{side}"], "of": counts[side]} for side in ("queries", "documents")
        },
        **{name: dict(sorted(count.items(), key=lambda c: (-c[1], c[0]))) for name, count in spoken.items()},
        "near": NEAR,
        "duplicates": {
            side: {
                "of": counts[side],
                "exact": counts[side] - len(texts.texts),
                "near": len(near[side].found),
                "near_of": near[side].count,
            }
            for side, texts in sides.items()
        },
        "against": {
            name: {of: overlap.report(store) for named, of, overlap in overlaps if named == name}
            for name in sets
        },
        "noise": {kind: entry for kind, entry in m["noise"].items() if entry["count"]},
        "scores": _scores(scores),
        **_packing(store, config),
        "samples": _samples(store, config, tokenizer),
    }


def check(config: DataConfig, against: Iterable[str], output: str) -> None:
    """UserError for what inspect() would find out after the store is built."""
    signer()
    read = [file for group in files_of(config.datasets) for file in group]
    read += [file for name in against for file in source_files(evaluation_set(name))]
    if output:
        probe_file(Path(output))
        refuse_inputs((Path(output), Path(output).with_suffix(".html")), read)


# ------------------------------------------------------------------------------------------ texts


def _read(
    config: DataConfig, tokenizer: Tokenizer, store: Store, sides: dict[str, Distinct]
) -> tuple[dict[str, Counter[str]], dict[str, array[float]]]:
    """(languages and scripts, scores) of all rows, whose texts go into sides."""
    spoken = {name: Counter[str]() for name in ("languages", "query_scripts", "document_scripts")}
    scores = {"positives": array("f"), "negatives": array("f")}
    number = -1
    rows = (row for dataset in config.datasets for row in rows_of(config, dataset, tokenizer))
    for number, row in enumerate(rows):
        sides["queries"].add(row.query, number)
        spoken["languages"][row.lang] += 1
        spoken["query_scripts"][script(row.query)] += 1
        for text in (*row.pos, *row.neg):
            if sides["documents"].add(text, number):
                spoken["document_scripts"][script(text)] += 1
        scores["positives"].extend(row.pos_scores)
        scores["negatives"].extend(row.neg_scores)
    if number + 1 != len(store):
        raise UserError(
            f"the datasets have {number + 1:,} rows and their store {len(store):,}: did a file change?"
        )
    return spoken, scores


def _show(
    side: str, texts: Texts, sign: Callable[..., np.ndarray], indexes: list[NearIndex], log: Log
) -> None:
    """Every text to all indexes, with progress."""
    begun = said = time.monotonic()
    done, beginnings = 0, (text[:CHARACTERS] for text in texts)
    while part := list(islice(beginnings, 1024)):
        signatures = sign(part)
        for index in indexes:
            index.show(done, part, signatures)
        done += len(part)
        if (now := time.monotonic()) - said >= PROGRESS_S:
            said = now
            left = (now - begun) * (len(texts) - done) / done
            log(f"compared {done:,} of {len(texts):,} distinct {side}; about {left:.0f} s left")


# ------------------------------------------------------------------------------------------ figures


def _histogram_of_counts(offsets: np.ndarray) -> dict[str, int]:
    """{how many: rows that have so many}."""
    values, rows = np.unique(np.diff(offsets), return_counts=True)
    return {str(value): count for value, count in zip(values.tolist(), rows.tolist(), strict=True)}


def _histogram(values: np.ndarray, low: float, high: float) -> dict[str, list[float]]:
    counts, edges = np.histogram(values, NUM_BINS, (low, high if high > low else low + 1))
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def _lengths(lengths: np.ndarray) -> dict[str, Any]:
    total = int(lengths.sum(dtype=np.int64))
    return {
        "total": total,
        "mean": round(total / len(lengths), 2),
        "quantiles": quantiles(lengths, LENGTHS_AT),
        "histogram": _histogram(lengths, 0, int(lengths.max())),
    }


def _uncut(texts: Distinct, tokenizer: Tokenizer) -> dict[str, Any]:
    """Of a sample, without instruction."""
    places = texts.sample(UNCUT)
    arrays = tokenizer.encode((texts.texts[place] for place in places.tolist()), 1 << 30)
    lengths = np.array([len(ids) for ids in arrays])
    return {"texts": len(lengths), "of": len(texts.texts), "quantiles": quantiles(lengths, LENGTHS_AT)}


def _scores(scores: dict[str, array[float]]) -> dict[str, Any] | None:
    values = {name: np.frombuffer(found, np.float32) for name, found in scores.items() if found}
    if not values:
        return None
    low, high = (float(f([f(v) for v in values.values()])) for f in (np.min, np.max))
    return {
        name: {"count": len(v), "quantiles": quantiles(v), "histogram": _histogram(v, low, high)}
        for name, v in values.items()
    }


def _packing(store: Store, config: DataConfig) -> dict[str, Any]:
    """Rows drawn and packed as training does it, without those that do not fit, and the same rows padded."""
    long = int((longest_draws(store, config.num_hard_negatives, config.negatives) > config.max_tokens).sum())
    found: dict[str, Any] = {"rows_that_do_not_fit": long, "packing": [], "padded": []}
    if long == len(store):
        return found
    drop = replace(config, on_long_row="drop")
    mix = population(store, drop, True, log=lambda line: None, seed=SEED).parts
    draws = sum(part.draws for part in mix)
    most = draws if config.batches == "mixed" else min(len(part.rows) for part in mix if len(part.rows))
    for size in sorted({min(size, most) for size in STEPS}):
        drawn, steps = sampler(mix, config.batches, size, SEED), min(DRAWN, draws) // size
        batches = [load_batch(store, drawn, step, 0, 1, config, seed=SEED) for step in range(steps)]
        micro_batches = sum(len(parts) for parts, _ in batches)
        tokens = sum(count for _, count in batches)
        density = round(tokens / (micro_batches * config.max_tokens), 4)
        figures = {"rows_a_step": size, "steps": steps, "micro_batches": micro_batches, "tokens": tokens}
        found["packing"].append({**figures, "density": density})
    queries_B, documents_BM = drawn_lengths(store, config, Sampler(mix, min(DRAWN, draws), SEED))
    tokens = int(queries_B.sum() + documents_BM.sum())
    for size in PADDED:
        slots = padded_slots(queries_B, documents_BM, size)
        useful = round(tokens / slots, 4)
        found["padded"].append({"rows_a_batch": size, "tokens": tokens, "slots": slots, "useful": useful})
    return found


def drawn_lengths(store: Store, config: DataConfig, drawn: Sampler) -> tuple[np.ndarray, np.ndarray]:
    """int64 [B], [B, 1 + K], 0 where missing: tokens of the texts of the sampler's first step."""
    rows_B, K = drawn.rows(0), config.num_hard_negatives
    ids_BM = choose_documents(store, rows_B, drawn.epochs(0), K, drawn.seed, config.negatives)
    documents_BM = np.where(ids_BM >= 0, store.document_lengths[ids_BM], 0)
    return store.query_lengths[rows_B].astype(np.int64), documents_BM.astype(np.int64)


def padded_slots(queries_B: np.ndarray, documents_BM: np.ndarray, size: int) -> int:
    """Tokens that the rows take, `size` at a time in this order, queries and documents each padded to the
    longest of theirs; a document that is missing takes none."""
    slots = 0
    for start in range(0, len(queries_B), size):
        queries, documents = queries_B[start : start + size], documents_BM[start : start + size]
        slots += len(queries) * int(queries.max()) + int((documents > 0).sum()) * int(documents.max())
    return slots


def _samples(store: Store, config: DataConfig, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Rows as the model sees them in epoch 0: decoded, with special tokens and instruction, cut."""
    rows_B = Sampler(len(store), min(SHOWN, len(store)), SEED).rows(0)
    first_B, K = np.zeros_like(rows_B), config.num_hard_negatives
    ids_BM = choose_documents(store, rows_B, first_B, K, SEED, config.negatives)
    samples = []
    for row, ids in zip(rows_B.tolist(), ids_BM.tolist(), strict=True):
        texts = [("query", store.query_tokens(row))]
        names = ("positive", *(["negative"] * config.num_hard_negatives))
        texts += [(name, store.document_tokens(i)) for name, i in zip(names, ids, strict=True) if i >= 0]
        seen = [{"is": name, "tokens": len(t), "text": tokenizer.decode(t)} for name, t in texts]
        samples.append({"where": store.where(row), "texts": seen})
    return samples
