"""Datasets with lengths of their own: cut, counted, named and refused each by its own."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Library

from nemo_embed_core.checkpoint.source import usage_of_training
from nemo_embed_core.config import DataConfig, DatasetConfig
from nemo_embed_core.config.plan import LengthsConfig
from nemo_embed_core.data.build import open_store, with_store
from nemo_embed_core.data.packing import known_in_batch
from nemo_embed_core.data.population import population
from nemo_embed_core.data.prompts import query_prompt
from nemo_embed_core.errors import DataError, UserError
from nemo_embed_core.options import to_dict
from nemo_embed_core.plan.lengths import texts_of

SHARED = ["a text that both have " + "and go on with " * 9, "a short one"]
LENGTHS = {"a": (30, 12), "b": (16, 40), "c": (30, 40)}


def words(count: int, seed: int) -> str:
    return " ".join(f"w{(seed * 7 + i) % 97}" for i in range(count))


def rows_of(name: str) -> list[dict[str, Any]]:
    """A query of 3 to 14 words; every row of a and b brings what they share."""
    seed = ord(name)
    return [
        {
            "query": f"{name} {words(3 + i % 12, seed + i)}",
            "pos": [words(2 + (5 * i) % 23, 3 * seed + i)],
            "neg": [SHARED[i % 2] if name != "c" else words(9, seed * i + 1), f"{name} no {i}"],
        }
        for i in range(20)
    ]


@pytest.fixture
def config(tmp_path) -> DataConfig:
    """c has the lengths of all."""
    for name in LENGTHS:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(name)))
    a, b, c = (DatasetConfig(path=str(tmp_path / f"{name}.jsonl")) for name in LENGTHS)
    return DataConfig(
        datasets=[replace(a, document_max_length=12, task="Find"), replace(b, query_max_length=16), c],
        cache_dir=str(tmp_path / "cache"), query_max_length=30, document_max_length=40,
        num_hard_negatives=2, max_tokens=400,
    )  # fmt: skip


def opened(config: DataConfig, tokenizer, log=lambda line: None):
    return open_store(config, tokenizer, log=log)


def test_texts_are_cut_and_counted_as_their_dataset_says(config, tokenizer, tokenizer_folder):
    library, lines = Library.from_file(str(tokenizer_folder / "tokenizer.json")), list[str]()
    store = opened(config, tokenizer, lines.append)
    row, pieces = 0, {}
    for (name, (query_length, length)), source in zip(
        LENGTHS.items(), store.manifest["sources"], strict=True
    ):
        prompt, cut_queries, texts = query_prompt("Find") if name == "a" else "", 0, {}
        for data in rows_of(name):
            whole = library.encode(prompt + data["query"]).ids
            cut_queries += len(whole) > query_length
            assert store.query_tokens(row).tolist() == whole[:query_length]
            ids = [*store.positives(row).tolist(), *store.negatives(row).tolist()]
            for text, doc_id in zip([*data["pos"], *data["neg"]], ids, strict=True):
                whole = texts.setdefault(text, library.encode(text).ids)
                assert store.document_tokens(doc_id).tolist() == whole[:length]
                assert pieces.setdefault((text, length), doc_id) == doc_id, "once for each length"
            row += 1
        cut = sum(len(whole) > length for whole in texts.values())
        found = [source[key] for key in ("documents", "truncated_queries", "truncated_documents")]
        assert found == [len(texts), cut_queries, cut] and 0 < cut < len(texts)
        said = f"20 rows from {config.datasets[0].path[:-7]}{name}.jsonl, {len(texts)} documents; truncated: "
        said += f"{cut_queries} quer{'y' if cut_queries == 1 else 'ies'} ({cut_queries / 20:.2%}) at "
        said += f"{query_length} tokens, {cut} documents ({cut / len(texts):.2%}) at {length}"
        assert said in lines[-1]
    assert len(set(pieces.values())) == len(pieces) == store.num_documents
    every = [pieces[text, length] for text, length in pieces]
    total = sum(len(library.encode(text).ids) > length for text, length in pieces)
    assert store.manifest["truncated_documents"] == total and sorted(every) == list(range(len(every)))
    assert f"at 16 to 30 tokens, {total} documents ({total / len(every):.2%}) at 12 to 40" in lines[-1]
    short, long = pieces[SHARED[0], 12], pieces[SHARED[0], 40]
    assert store.document_lengths[[short, long]].tolist() == [12, 40]
    assert store.same_as[short] == store.same_as[long], "one text for the loss, so no negative of itself"
    lacks = replace(config, datasets=[replace(d, document_max_length=40) for d in config.datasets])
    assert opened(lacks, tokenizer).num_documents == len({text for text, _ in pieces})


def test_a_text_that_is_a_positive_here_and_a_longer_negative_there_is_no_negative(tmp_path, tokenizer):
    rows = {"a": {"query": "one", "pos": [SHARED[0]], "neg": ["x"]},
            "b": {"query": "two", "pos": ["y"], "neg": [SHARED[0].upper(), "z"]}}  # fmt: skip
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    a, b = (DatasetConfig(path=str(tmp_path / f"{name}.jsonl")) for name in rows)
    config = DataConfig(datasets=[replace(a, document_max_length=9), b], cache_dir=str(tmp_path / "cache"))
    store = opened(config, tokenizer)
    ids = [[store.positives(row)[0], *store.negatives(row)] for row in (0, 1)]
    ids_BM = store.same_as[np.array([[*ids[0], ids[0][1]], ids[1]])]
    assert ids_BM[0, 0] == ids_BM[1, 1] != ids_BM[1, 0]
    assert ids[0][0] != ids[1][1] and store.document_lengths[ids[0][0]] == 9
    assert not known_in_batch(store, np.array([0, 1]), ids_BM).size, "its own positive has that id already"


def test_the_digest_says_what_each_dataset_is_cut_at(config, tokenizer):
    def digest(*lengths: tuple[int | None, int | None], query: int = 30, document: int = 40) -> str:
        both = ({"query_max_length": q, "document_max_length": d} for q, d in lengths)
        own = [replace(d, **options) for d, options in zip(config.datasets, both, strict=True)]
        changed = replace(config, datasets=own, query_max_length=query, document_max_length=document)
        return opened(changed, tokenizer).digest

    none = (None, None)
    plain = digest(none, none, none)
    assert digest((30, None), (None, 40), (30, 40)) == plain, "said or not, it is the same store"
    assert digest((30, 40), (30, 40), (30, 40), query=99, document=77) == plain
    others = {
        digest((None, 12), none, none), digest(none, (None, 12), none), digest((28, None), none, none),
        digest((29, None), none, none), digest(none, none, none, document=12),
    }  # fmt: skip
    assert len(others | {plain}) == 6


def test_a_store_without_its_sources_has_its_lengths(config, tokenizer):
    store = opened(config, tokenizer)
    assert store.max_lengths == list(LENGTHS.values())
    for name in LENGTHS:
        Path(config.datasets[0].path[:-7] + f"{name}.jsonl").unlink()
    alone = replace(config, datasets=[], store=store.digest[:12])
    assert opened(alone, tokenizer).digest == store.digest
    assert with_store(alone).all_lengths() == store.max_lengths
    same = replace(config, store=store.digest[:12])
    assert opened(same, tokenizer).digest == store.digest
    other = replace(same, datasets=[*same.datasets[:2], replace(same.datasets[2], query_max_length=29)])
    with pytest.raises(UserError, match=r"query_max_length was \[30, 16, 30\], now \[30, 16, 29\]"):
        opened(other, tokenizer)
    manifest = store.folder / "manifest.json"
    manifest.write_text(
        manifest.read_text().replace('"document_max_length": [', '"document_max_length": [9,')
    )
    with pytest.raises(UserError, match="has 4 document_max_length for its sources"):
        opened(alone, tokenizer)


def test_a_row_is_too_long_by_the_lengths_of_its_dataset(config, tokenizer):
    """One file twice, whole and cut at 12: 16 + 3 x 12 fit into 60, its longest rows whole do not."""
    one = replace(config.datasets[1], document_max_length=None)
    config = replace(config, datasets=[one, replace(one, document_max_length=12, name="cut")], max_tokens=60)
    store = opened(config, tokenizer)
    with pytest.raises(UserError) as caught:
        population(store, config, True)
    first, long = store.dataset_ends[0], str(caught.value).count("b.jsonl:")
    assert f"{long} of 40 rows can have more than data.max_tokens=60 tokens" in str(caught.value)
    assert 0 < long < 20 and "lower data.document_max_length (or a dataset's own)" in str(caught.value)
    left = population(store, replace(config, on_long_row="drop"), True, log=lambda line: None).parts
    assert [len(part.rows) for part in left] == [20 - long, 20] and left[1].rows[0] == first


def test_what_cannot_be_a_length_is_refused_by_the_datasets_name(config, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"b\.jsonl: query_max_length=1 must be at least 2 tokens"):
        replace(config.datasets[1], query_max_length=1)
    small = replace(config.datasets[0], query_max_length=8)
    with pytest.raises(UserError, match=r"data\.datasets\[a\.jsonl\]\.query_max_length=8 tokens leaves no"):
        opened(replace(config, datasets=[small, *config.datasets[1:]]), tokenizer)
    small = replace(config.datasets[1], document_task="Find what it says", document_max_length=9)
    with pytest.raises(UserError, match=r"data\.datasets\[b\.jsonl\]\.document_max_length=9 tokens leaves"):
        opened(replace(config, datasets=[config.datasets[0], small]), tokenizer)
    row = {"query": "x", "pos": ["y"], "neg": [], "prompt": "Given a question, find what answers it"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    own = DatasetConfig(path=str(tmp_path / "p.jsonl"), query_max_length=200)
    opened(replace(config, datasets=[own]), tokenizer)
    with pytest.raises(
        DataError, match=r"p\.jsonl:1: data\.datasets\[p\.jsonl\]\.query_max_length=9 tokens leaves"
    ):
        opened(replace(config, datasets=[replace(own, query_max_length=9)]), tokenizer)


def test_the_planner_and_the_model_know_the_lengths(config):
    """A row is of one dataset: the longest query of one never meets the longest documents of another."""
    whole = LengthsConfig(query_mean=512, query_p95=512, document_mean=512, document_p95=512)
    for data, longest, usage in (
        (config, 30 + 3 * 40, (30, 40)),
        (replace(config, datasets=config.datasets[:2]), 16 + 3 * 40, (30, 40)),
        (replace(config, datasets=config.datasets[:1]), 30 + 3 * 12, (30, 12)),
    ):
        texts = texts_of("", data, False, whole, 8, 0)
        assert texts.longest == longest and {int(b.max()) for b in texts.batches} == {max(usage)}
        found = usage_of_training(to_dict(data), "mean")
        assert (found.query_max_length, found.document_max_length) == usage
    half = LengthsConfig(query_mean=20, query_p95=20, document_mean=20, document_p95=20)
    assert texts_of("", config, False, half, 8, 0).longest == 20 + 3 * 20
