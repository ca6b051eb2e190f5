"""Teachers: sentence-transformers folders, precomputed embeddings of any array library, several models
together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_mining import FakeEmbedder, KnownVectors, Row, lines_of, make_rows, mine, on_ranks, pool_of

from nemo_embed_core.checkpoint.source import resolve
from nemo_embed_core.config import DatasetConfig, MineConfig
from nemo_embed_core.data.normal_form import normal_key
from nemo_embed_core.data.prompts import query_prompt
from nemo_embed_core.encoders.precomputed import as_rows
from nemo_embed_core.errors import UserError
from nemo_embed_core.mine.corpus import Ranks
from nemo_embed_core.mine.run import make_plan
from nemo_embed_core.mine.run import mine as run_mine
from nemo_embed_core.mine.teachers import Teacher, Teachers, open_precomputed, precomputed


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda file: None)


# -------------------------------------------------------------------------------------- sentence-transformers


def write_bert(folder: Path, prompts: dict[str, str] | None = None) -> Path:
    """A random BERT of 32 channels with CLS pooling, and no Normalize module: its rows are not of unit
    length."""
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel, BertTokenizerFast

    bert = folder.with_name(folder.name + "-bert")
    bert.mkdir(parents=True)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("0123456789:")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (bert / "vocab.txt").write_text("\n".join(vocab) + "\n")
    torch.manual_seed(5)
    BertTokenizerFast(vocab_file=str(bert / "vocab.txt")).save_pretrained(bert)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(vocab_size=len(vocab), max_position_embeddings=64, initializer_range=0.5, **sizes)
    BertModel(config).save_pretrained(bert)
    word = models.Transformer(str(bert), max_seq_length=48)
    SentenceTransformer(
        modules=[word, models.Pooling(32, pooling_mode="cls")], prompts=prompts, device="cpu"
    ).save(str(folder))
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_sentence_transformers_folder_mines_what_the_library_itself_ranks(tmp_path):
    from nemo_embed_core.encoders.sentence_transformer import SentenceTransformerEncoder

    folder = write_bert(tmp_path / "model", prompts={"query": "query: ", "document": "passage: "})
    assert resolve(folder).kind == "sentence-transformers"
    rows = make_rows(20)
    prompts = {"prompt": "query: ", "document_prompt": "passage: "}
    teacher = Teacher.of_encoder(SentenceTransformerEncoder(folder, "cpu", "fp32"), **prompts)
    report = mine(rows, tmp_path / "out.jsonl", teacher, dtype="float32", threshold=0.99)
    assert report["models"][0]["prompt"] == "query: "

    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    texts = list(dict.fromkeys(t for r in rows for t in (*r.pos, *r.neg)))
    options = {"normalize_embeddings": True, "show_progress_bar": False}
    documents = dict(zip(texts, model.encode(texts, prompt="passage: ", **options), strict=True))
    queries = model.encode([r.query for r in rows], prompt="query: ", **options)
    found = 0
    for row, q, line in zip(rows, queries, lines_of(tmp_path / "out.jsonl"), strict=True):
        np.testing.assert_allclose(line["pos_scores"], [q @ documents[t] for t in row.pos], atol=2e-6)
        np.testing.assert_allclose(line["neg_scores"], [q @ documents[t] for t in line["neg"]], atol=2e-6)
        limit = 0.99 * min(line["pos_scores"])
        known = {
            " ".join(p.split()).casefold() for r in rows if r.query == row.query for p in (*r.pos, r.query)
        }
        others = [q @ v for t, v in documents.items() if " ".join(t.split()).casefold() not in known]
        best = sorted((s for s in others if s < limit - 1e-5), reverse=True)[: len(line["neg"])]
        assert len(best) < 4 or min(line["neg_scores"]) > best[-1] - 1e-5
        found += len(line["neg"])
    assert found > 20

    # The run takes the folder's own prompts and limit, and loads it once for all data sets.
    write_rows_file(tmp_path / "rows.jsonl", rows)
    config = MineConfig(
        model=[str(folder)], data=str(tmp_path / "rows.jsonl"), output=str(tmp_path / "o"), device="cpu"
    )
    plan, loads = make_plan(config, lambda _: None), []

    def load(source):
        loads.append(source.kind)
        return SentenceTransformerEncoder(source.path, "cpu", "fp32")

    teachers, both = Teachers(plan.sources, load), (plan.datasets["rows"], plan.usage["rows"])
    (loaded,), (again,) = list(teachers.of(*both)), list(teachers.of(*both))
    assert (
        loads == ["sentence-transformers"]
        and loaded.queries.digest == teacher.queries.digest == again.queries.digest
    )
    assert (loaded.prompt, loaded.document_prompt, loaded.query_max_length) == ("query: ", "passage: ", 48)
    changed = folder / "config_sentence_transformers.json"
    changed.write_text(changed.read_text().replace("query: ", "question: "))
    assert SentenceTransformerEncoder(folder, "cpu", "fp32").digest != loaded.queries.digest

    # A folder that compares by dot products is mined by them, with an explicit task in place of its prompt.
    changed.write_text(changed.read_text().replace('"cosine"', '"dot"'))
    config = replace(config, task="find", document_max_length=10, threshold=1.9)
    run_mine(make_plan(config, lambda _: None), Ranks(), "cpu", load, lambda _: None)
    (described,) = json.loads((tmp_path / "o.report.json").read_text())["models"]
    assert (described["similarity"], described["dtype"], described["prompt"]) == (
        "dot",
        "float32",
        query_prompt("find"),
    )
    tokens = [len(model.tokenizer("passage: " + t)["input_ids"]) for t in texts]
    assert described["documents_truncated"] == sum(n > 10 for n in tokens) > 0
    q, model.max_seq_length = model.encode([rows[0].query], prompt=query_prompt("find"))[0], 10
    line = lines_of(tmp_path / "o")[0]
    for side in ("pos", "neg"):
        want = [q @ v for v in model.encode(line[side], prompt="passage: ")]
        np.testing.assert_allclose(line[f"{side}_scores"], want, rtol=1e-5)
    assert line["neg"] and max(line["pos_scores"]) > 1.5, "no cosine"
    with pytest.raises(UserError, match=r"query_max_length=8 tokens leaves no room for text"):
        make_plan(replace(config, query_max_length=8), lambda _: None)


def write_rows_file(path, rows):
    lines = [json.dumps({"query": r.query, "pos": r.pos, "neg": r.neg}) + "\n" for r in rows]
    path.write_text("".join(lines))


# ------------------------------------------------------------------------------------------ precomputed


class OnlyDlpack:
    """What a CuPy or JAX array is to us."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def embedded(rows):
    """(document texts, vectors, query texts, vectors) in another order, with texts that no run needs."""
    embedder, rng = FakeEmbedder(), np.random.default_rng(3)
    documents = [*{t for r in rows for t in (*r.pos, *r.neg)}, "not needed"]
    queries = [*{r.query for r in rows}, "not needed either"]
    documents.sort(), queries.sort()
    rng.shuffle(documents), rng.shuffle(queries)
    return documents, embedder.encode(documents), queries, embedder.encode(queries)


def test_arrays_of_every_library_mine_the_bytes_of_the_model_that_made_them(tmp_path):
    rows = make_rows(25)
    mine(rows, tmp_path / "model.jsonl", FakeEmbedder())
    want = (tmp_path / "model.jsonl").read_bytes()
    document_texts, documents, query_texts, queries = embedded(rows)
    np.save(tmp_path / "d.npy", documents)
    kinds = {
        "numpy": (documents, queries),
        "fp64": (documents.astype(np.float64), queries.astype(np.float64)),
        "fortran": (np.asfortranarray(documents), queries),
        "map": (np.load(tmp_path / "d.npy", mmap_mode="r"), queries),
        "torch": (torch.from_numpy(documents), torch.from_numpy(queries)),
        "dlpack": (OnlyDlpack(documents), OnlyDlpack(queries)),
        # Cosines: the lengths of rows do not matter. (Powers of two, so that not a bit changes.)
        "scaled": (
            documents * np.float32(2.0) ** np.arange(len(documents))[:, None].clip(0, 60),
            queries * 4,
        ),
    }
    for name, (d, q) in kinds.items():
        mine(rows, tmp_path / f"{name}.jsonl", precomputed(d, document_texts, q, query_texts))
        assert (tmp_path / f"{name}.jsonl").read_bytes() == want, name
    mine(
        rows,
        tmp_path / "bf16.jsonl",
        precomputed(torch.from_numpy(documents).bfloat16(), document_texts, queries, query_texts),
    )
    assert (tmp_path / "bf16.jsonl").read_bytes() != want
    assert isinstance(as_rows(kinds["map"][0]), np.memmap)


def test_folder_of_embeddings_is_read_through_its_own_texts_or_the_lines_of_a_beir_folder(tmp_path):
    rows = make_rows(25)
    mine(rows, tmp_path / "model.jsonl", FakeEmbedder())
    want = (tmp_path / "model.jsonl").read_bytes()
    document_texts, documents, query_texts, queries = embedded(rows)
    folder, beir = tmp_path / "embeddings", tmp_path / "beir"
    folder.mkdir(), (beir / "qrels").mkdir(parents=True)
    np.save(folder / "documents.npy", documents), np.save(folder / "queries.npy", queries)
    (beir / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\n")
    for name, texts in (("corpus", document_texts), ("queries", query_texts)):
        lines = [json.dumps({"_id": f"{name[0]}{i}", "text": text}) + "\n" for i, text in enumerate(texts)]
        (beir / f"{name}.jsonl").write_text("".join(lines))
    assert resolve(folder).kind == "precomputed"
    dataset = DatasetConfig(path=str(beir))
    with pytest.raises(UserError, match=r"which texts do the rows of documents\.npy belong to"):
        open_precomputed(folder)
    mine(rows, tmp_path / "beir.jsonl", open_precomputed(folder, dataset))
    assert (tmp_path / "beir.jsonl").read_bytes() == want
    # Files of its own go first: another order of rows, another order of lines.
    for name, texts, vectors in (("documents", document_texts, documents), ("queries", query_texts, queries)):
        np.save(folder / f"{name}.npy", vectors[::-1].astype(np.float32))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[::-1]))
    mine(rows, tmp_path / "own.jsonl", open_precomputed(folder, dataset))
    assert (tmp_path / "own.jsonl").read_bytes() == want
    with open(folder / "queries.jsonl", "a") as file:
        file.write('{"text": "one too many"}\n')
    with pytest.raises(
        UserError, match=rf"queries.npy has {len(queries)} rows and .*queries.jsonl {len(queries) + 1} lines"
    ):
        open_precomputed(folder)
    (folder / "documents.npy").unlink()
    with pytest.raises(UserError, match=r"documents\.npy does not exist"):
        open_precomputed(folder)
    (folder / "documents.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(UserError, match=r"not a readable \.npy"):
        open_precomputed(folder)
    np.save(folder / "documents.npy", np.array([["a"]], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"not a readable \.npy"):
        open_precomputed(folder)


def test_embeddings_that_do_not_fit_are_refused_with_the_numbers(tmp_path):
    rows = make_rows(8)
    document_texts, documents, query_texts, queries = embedded(rows)
    for wrong, word in [
        (documents[0], r"shape \(32,\)"),
        (documents.astype(np.int8), "dtype int8"),
        (documents.astype(complex), "dtype complex128"),
        (documents[:0], r"shape \(0, 32\)"),
        ([[1.0]], "are a list"),
        (documents[:-1], f"{len(documents) - 1} rows and {len(documents)} texts"),
        (documents[:, :31], "queries have 32 columns and documents 31"),
    ]:
        with pytest.raises(UserError, match=word):
            precomputed(wrong, document_texts, queries, query_texts)
    for value in (np.nan, np.inf, 0.0):
        broken = documents.copy()
        broken[document_texts.index(rows[2].pos[0])] = value
        with pytest.raises(UserError, match=rf"text \d+ \('{rows[2].pos[0][:50]}"):
            mine(rows, tmp_path / f"{value}.jsonl", precomputed(broken, document_texts, queries, query_texts))
    teacher = precomputed(documents, document_texts, queries, query_texts)
    with pytest.raises(UserError, match=r"have no row for 'unheard of'... and 0 more"):
        mine([*rows, Row("w1", ["unheard of"], [])], tmp_path / "x.jsonl", teacher)


def test_other_rows_or_other_texts_are_another_model(tmp_path):
    rows = make_rows(8)
    document_texts, documents, query_texts, queries = embedded(rows)
    teacher = precomputed(documents, document_texts, queries, query_texts)
    mine(rows, tmp_path / "out.jsonl", teacher)
    other = documents.copy()
    other[5] *= -1
    with pytest.raises(UserError, match=r"00000.npy was encoded with model .* never reused"):
        mine(rows, tmp_path / "out.jsonl", precomputed(other, document_texts, queries, query_texts))


# ------------------------------------------------------------------------------------------ several models


def combined_by_definition(rows, models, threshold, k, how, depth, ranks=None):
    """[(texts, scores)] after the docstring of mine/lists.py: combine, one passage at a time."""
    pool = pool_of(t for r in rows for t in (*r.pos, *r.neg))
    texts = pool.texts[: pool.num_searched]
    answers = []
    for row in rows:
        same = [r for r in rows if r.query == row.query]
        known = {pool.searched_by_key(normal_key(t)) for r in same for t in (row.query, *r.pos)}
        lists, score, ceilings = [], [], []
        for model in models:
            q = model.vectors[row.query].astype(np.longdouble)
            s = [np.float32((q * model.vectors[t].astype(np.longdouble)).sum()) for t in texts]
            low = min(float(np.float32((q * model.vectors[p].astype(np.longdouble)).sum())) for p in row.pos)
            limit = low - (1 - threshold) * abs(low)
            allowed = [d for d in range(len(texts)) if d not in known and (ranks or float(s[d]) < limit)]
            lists.append(sorted(allowed, key=lambda d: (-s[d], d))[:depth])
            score.append(s)
            ceilings.append(limit)
        candidates = (
            set.intersection(*map(set, lists)) if how == "intersection" else set.union(*map(set, lists))
        )
        below = {d for d in candidates if all(float(s[d]) < c for s, c in zip(score, ceilings, strict=True))}
        candidates = candidates if ranks else below

        def mean_rank(d):
            return sum(one.index(d) if d in one else len(one) for one in lists) / len(lists)  # noqa: B023

        best = sorted(candidates, key=lambda d: (mean_rank(d), d))
        best = [d for d in best[slice(*ranks)] if d in below][:k] if ranks else best[:k]
        answers.append(([texts[d] for d in best], [score[0][d] for d in best]))
    return answers


def two_models(seed, ties=False, width=6):
    rng = np.random.default_rng(seed)
    rows = [Row(f"q{i}", [f"d{j}" for j in rng.choice(50, 2, replace=False)], []) for i in range(12)]
    rows.append(Row("q0", ["d0"], [f"d{i}" for i in range(1, 50)]))
    texts = [*(f"d{i}" for i in range(50)), *(f"q{i}" for i in range(12))]
    models = []
    for number in range(3):
        x = rng.standard_normal((len(texts), width)) + (models[0].matrix if models else 0)
        if ties:
            x = np.sign(x) * np.array([1] * (width - 1) + [0.5])
        x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
        model = KnownVectors(dict(zip(texts, x, strict=True)), digest=f"model {number}")
        model.matrix = x
        models.append(model)
    return rows, models


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("how", ["intersection", "mean_rank"])
def test_several_models_are_combined_as_defined_on_any_number_of_ranks(tmp_path, how, ties):
    rows, models = two_models(1, ties)
    differs = 0
    for threshold, k, depth, count in ((0.95, 3, 8, 2), (0.6, 4, 5, 2), (1.05, 3, 30, 3)):
        want = combined_by_definition(rows, models[:count], threshold, k, how, max(k, depth))
        alone = combined_by_definition(rows, models[:1], threshold, k, how, max(k, depth))
        differs += sum(a[0] != b[0] for a, b in zip(want, alone, strict=True))
        outputs = set()
        for size in (1, 2, 3):
            output = tmp_path / f"{threshold}-{size}.jsonl"
            options = {"threshold": threshold, "num_negatives": k, "combine": how, "combine_depth": depth}
            options |= {"dtype": "float32", "block_queries": 5, "shard_size": 11}

            def one(ranks, *, output=output, count=count, options=options):
                # A generator: one model at a time is alive.
                return mine(rows, output, (m for m in models[:count]), ranks=ranks, **options)

            on_ranks(size, one)
            for line, (texts, scores) in zip(lines_of(output), want, strict=True):
                assert line["neg"] == texts
                assert np.array_equal(np.float32(line["neg_scores"]), np.array(scores, np.float32))
            outputs.add(output.read_bytes())
        assert len(outputs) == 1
    assert differs > 10, "the second model never mattered"


@pytest.mark.parametrize("how", ["intersection", "mean_rank"])
def test_range_counts_in_the_combined_order_what_is_above_the_ceilings_too(tmp_path, how):
    rows, models = two_models(4)
    options = {
        "threshold": 0.8,
        "num_negatives": 3,
        "combine": how,
        "combine_depth": 45,
        "range_min": 8,
        "range_max": 30,
    }
    mine(rows, tmp_path / "out.jsonl", models[:2], dtype="float32", **options)
    want = combined_by_definition(rows, models[:2], 0.8, 3, how, 45, ranks=(8, 30))
    assert [line["neg"] for line in lines_of(tmp_path / "out.jsonl")] == [texts for texts, _ in want]
    assert len({len(texts) for texts, _ in want}) > 1, "the ceiling took something away"


def test_mean_rank_never_takes_what_is_above_the_ceiling_of_a_model_whose_list_lacks_it(tmp_path):
    """b is the best of the first model; the second scores it above the positive, so its list does not have
    it."""
    angles = [
        {"q": 0.0, "p": 0.2, "b": 0.5, "c": 0.9, "d": 1.2},
        {"q": 0.0, "p": 0.5, "b": 0.1, "c": 0.9, "d": 1.2},
    ]
    models = [
        KnownVectors({t: np.array([np.cos(a), np.sin(a)]) for t, a in one.items()}, digest=str(i))
        for i, one in enumerate(angles)
    ]
    rows = [Row("q", ["p"], ["b", "c", "d"])]
    for how in ("intersection", "mean_rank"):
        mine(rows, tmp_path / f"{how}.jsonl", models, combine=how, num_negatives=3)
        assert lines_of(tmp_path / f"{how}.jsonl")[0]["neg"] == ["c", "d"]
    mine(rows, tmp_path / "alone.jsonl", models[0], num_negatives=3)
    assert lines_of(tmp_path / "alone.jsonl")[0]["neg"] == ["b", "c", "d"]


def test_sweep_with_several_models_is_exact_and_adding_a_model_reuses_the_first_ones_shards(tmp_path):
    rows, models = two_models(2)
    options = {"dtype": "float32", "num_negatives": 6, "combine": "mean_rank", "combine_depth": 7}
    report = mine(rows, tmp_path / "swept.jsonl", models[:2], threshold=0.9, sweep=[0.3, 0.7, 1.0], **options)
    counts = set()
    for entry in report["sweep"]:
        alone = mine(rows, tmp_path / "alone.jsonl", models[:2], threshold=entry["threshold"], **options)
        assert all(entry[key] == alone[key] for key in ("with_no_negatives", "with_k_negatives", "negatives"))
        counts.add(entry["negatives"])
    assert len(counts) > 1
    said = []
    mine(rows, tmp_path / "alone.jsonl", models, threshold=1.0, log=said.append, **options)
    assert sum("shards of documents were already there" in line for line in said) == 2
    assert any(line.startswith("encoded") and "documents" in line for line in said)
    with pytest.raises(UserError, match="never reused"):
        mine(rows, tmp_path / "alone.jsonl", models[::-1], **options)
