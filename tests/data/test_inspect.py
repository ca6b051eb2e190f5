"""A dataset looked at: every figure of a corpus that is small enough to count by hand, near-duplicates as
brute force finds them, and a page that is whole and obeys no text."""

import json
import random
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tiny import write_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from nemo_embed_core.config import DataConfig, DatasetConfig, PrepareConfig
from nemo_embed_core.data.build import open_store
from nemo_embed_core.data.inspect import check, inspect, padded_slots
from nemo_embed_core.data.inspect_page import page, print_report
from nemo_embed_core.data.near import NearIndex, signer, similarity
from nemo_embed_core.data.tokenizer import load_tokenizer
from nemo_embed_core.errors import UserError

TEN = "one two three four five six seven eight nine ten"
NINE = "red blue green white black pink grey brown gold"
ATTACK = "<script>alert(1)</script> & 'quotes'"
# Tokens of a text: its words and <s>; of a query also "Go". The last row fits into no micro-batch.
ROWS = [
    {"query": "what counts", "pos": [f"{TEN} eleven"], "neg": [f"{TEN} twelve", NINE],
     "lang": "<i>en", "pos_scores": [0.75], "neg_scores": [0.5, 0.25]},
    {"query": "Что\x1b это?", "pos": ["Это текст"], "neg": [], "lang": "ru", "pos_scores": [0.5]},
    {"query": "what  Counts.", "pos": [f"{NINE} silver"], "neg": ["red things", f"{TEN} eleven"]},
    {"query": ATTACK, "pos": [ATTACK + " twice", "four words are here"],
     "neg": [f"{NINE} tin", "a", "b", "a"]},
    {"query": "a query of very many words " + TEN, "pos": [f"{TEN} {NINE}"],
     "neg": [f"{NINE} zinc", "Red things!", NINE]},
]  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A token for each run of characters between spaces, <s> in front."""
    folder = tmp_path_factory.mktemp("words")
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    texts = [text for row in ROWS for text in (row["query"], *row["pos"], *row["neg"])]
    backend.train_from_iterator([*texts, "Go"], trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>"]))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def write_beir(folder: Path, queries: dict[str, str], corpus: dict[str, str], split: str) -> None:
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("queries", queries), ("corpus", corpus)):
        lines = [json.dumps({"_id": key, "text": text}) for key, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    judged = [f"{query}\t{document}\t1" for query, document in zip(queries, corpus, strict=False)]
    (folder / f"qrels/{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")


@pytest.fixture
def small(tmp_path, words):
    (tmp_path / "a<b>.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = DataConfig(
        datasets=[DatasetConfig(path=str(tmp_path / "a<b>.jsonl"), task="Go {text}")],
        cache_dir=str(tmp_path / "cache"),
        query_max_length=9, document_max_length=15, num_hard_negatives=3, max_tokens=38,
    )  # fmt: skip
    return config, words, open_store(config, words, lambda line: None)


def test_every_figure_of_a_small_corpus(small, tmp_path):
    queries = {"q1": "What counts?", "q2": "who else", "q3": ROWS[4]["query"] + " more", "q4": ""}
    corpus = {
        "d1": f"{NINE} zinc!",
        "d2": f"{TEN} thirteen",
        "d3": "another text",
        "d4": "",
        "d5": "Red things",
    }
    write_beir(tmp_path / "beir", queries, corpus, "dev")
    name, said = f"{tmp_path / 'beir'}:dev", []
    report = inspect(*small, against=[name], log=said.append)
    assert [line.split(" (")[0] for line in said] == [
        f"{name}: documents that are empty: 1", f"{name}: queries that are empty: 1",
    ]  # fmt: skip
    assert report["sources"] == [
        {
            "path": str(tmp_path / "a<b>.jsonl"), "rows": 5, "documents": 14, "truncated_queries": 1,
            "truncated_documents": 1, "query_max_length": 9, "document_max_length": 15,
        }
    ]  # fmt: skip
    assert report["counts"] == {
        "rows": 5, "documents": 14, "positives": 6, "negatives": 9, "negatives_left_out": 1,
        "rows_without_negatives": 1, "merged_repeats": 1,
    }  # fmt: skip
    assert report["positives_per_row"] == {"1": 4, "2": 1}
    assert report["negatives_per_row"] == {"0": 1, "1": 1, "2": 1, "3": 2}
    tokens, at = report["tokens"], ("0", "0.5", "0.9", "0.95", "0.99", "1")
    assert [(tokens[side]["total"], tokens[side]["mean"]) for side in tokens] == [(26, 5.2), (105, 7.5)]
    assert tokens["queries"]["quantiles"] == dict(zip(at, (4, 4, 7.4, 8.2, 8.84, 9), strict=True))
    assert [tokens["documents"]["quantiles"][q] for q in ("0", "0.5", "1")] == [2, 7.5, 15]
    assert sum(tokens["documents"]["histogram"]["counts"]) == 14
    uncut = report["tokens_uncut"]
    assert [[uncut[side]["quantiles"][q] for q in ("0", "0.5", "1")] for side in uncut] == [
        [3, 3.5, 17], [2, 10, 20],
    ]  # fmt: skip
    assert report["truncated"] == {"queries": {"count": 1, "of": 5}, "documents": {"count": 1, "of": 14}}
    assert list(report["languages"].items()) == [("", 3), ("<i>en", 1), ("ru", 1)]
    assert report["query_scripts"] == {"Latin": 4, "Cyrillic": 1}
    assert report["document_scripts"] == {"Latin": 12, "Cyrillic": 1}
    assert report["duplicates"] == {
        "queries": {"of": 5, "exact": 1, "near": 0, "near_of": 4},
        "documents": {"of": 14, "exact": 1, "near": 6, "near_of": 13},
    }
    found = report["against"][name]
    assert [[found[side][key] for key in ("of", "exact", "near", "near_of")] for side in found] == [
        [3, 1, 1, 2], [4, 2, 1, 2],
    ]  # fmt: skip
    first = [
        (one["id"], one["where"].rsplit(":")[-1], one["similarity"]) for one in found["documents"]["first"]
    ]
    assert first == [("d1", "5", 1.0), ("d5", "3", 1.0), ("d2", "1", round(9 / 11, 4))]
    assert [one["data"] for one in found["queries"]["first"]] == ["what counts", ROWS[4]["query"]]
    assert report["noise"]["negatives left out, a positive of another row with the same query"]["count"] == 1
    scores = report["scores"]
    assert [(scores[side]["count"], scores[side]["quantiles"]["0.5"]) for side in scores] == [
        (2, 0.625),
        (2, 0.375),
    ]
    assert report["rows_that_do_not_fit"] == 1
    assert report["packing"] == [
        {"rows_a_step": 4, "steps": 1, "micro_batches": 3, "tokens": 88, "density": round(88 / 114, 4)}
    ]
    assert report["padded"] == [
        {"rows_a_batch": size, "tokens": 88, "slots": 140, "useful": round(88 / 140, 4)} for size in (4, 16)
    ]
    samples = {sample["where"].rsplit(":")[-1]: sample["texts"] for sample in report["samples"]}
    assert len(samples) == 4
    for line, texts in samples.items():
        row = ROWS[int(line) - 1]
        assert texts[0] == {"is": "query", "tokens": len(texts[0]["text"].split()),
                            "text": " ".join(["<s> Go", *row["query"].split()[:7]])}  # fmt: skip
        assert texts[1]["is"] == "positive" and texts[1]["text"].startswith("<s> ")
        of_negatives = sorted(
            " ".join(["<s>", *text.split()[:14]]) for text in {*row["neg"]} - {f"{TEN} eleven"}
        )
        assert sorted(text["text"] for text in texts[2:]) == of_negatives, "in the order of the draw"


def test_rows_are_packed_in_the_mix_that_training_draws(small):
    config, words, store = small
    twice = replace(config, datasets=[replace(config.datasets[0], weight=2.0)])
    report = inspect(twice, words, store, log=lambda line: None)
    assert [p["rows_a_step"] for p in report["packing"]] == [8]
    assert report["padded"][1] == {
        "rows_a_batch": 16,
        "tokens": 176,
        "slots": 280,
        "useful": round(176 / 280, 4),
    }
    assert report["counts"]["rows"] == 5


def test_a_few_short_rows_in_a_large_micro_batch_are_no_share_of_it(words, tmp_path, capsys):
    """Two tokens of 100,000 are a density of 0.0000."""
    (tmp_path / "one.jsonl").write_text('{"query": "a", "pos": ["b"], "neg": []}\n')
    data = DatasetConfig(path=str(tmp_path / "one.jsonl"))
    config = DataConfig(datasets=[data], cache_dir=str(tmp_path / "cache"), max_tokens=100_000)
    report = inspect(config, words, open_store(config, words, lambda line: None), log=lambda line: None)
    print_report(report)
    assert capsys.readouterr().out.count("too few rows") == 2 and "too few rows" in page(report)


def test_samples_have_the_negatives_that_training_takes(small):
    config, words, store = small
    first = replace(config, num_hard_negatives=1, negatives="first")
    for sample in inspect(first, words, store, log=lambda line: None)["samples"]:
        row = ROWS[int(sample["where"].rsplit(":")[-1]) - 1]
        left = [text for text in row["neg"] if text != f"{TEN} eleven"]
        seen = [text["text"] for text in sample["texts"] if text["is"] == "negative"]
        assert seen == [" ".join(["<s>", *text.split()[:14]]) for text in left[:1]]


def test_batches_of_one_dataset_are_packed_as_training_draws_them(small, tmp_path):
    config, words, _ = small
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in ROWS[::-1]))
    both = [config.datasets[0], replace(config.datasets[0], path=str(other))]
    for batches, steps in (("mixed", [(8, 1)]), ("one_source", [(4, 2)])):
        now = replace(config, datasets=both, batches=batches)
        report = inspect(now, words, open_store(now, words, lambda line: None), log=lambda line: None)
        assert [(p["rows_a_step"], p["steps"]) for p in report["packing"]] == steps


def test_rows_that_are_left_out_are_not_looked_at(small):
    config, words, store = small
    right = inspect(*small, log=lambda line: None)["counts"]
    with open(config.datasets[0].path, "a") as file:
        file.write('{"query": "left out", "pos": [], "neg": []}\n')
    config = replace(config, on_bad="drop")
    after = open_store(config, words, lambda line: None)
    report = inspect(config, words, after, log=lambda line: None)
    assert report["counts"] == right and len(after) == len(store)


def test_padding_is_to_the_longest_of_each_side_of_each_batch():
    queries = np.array([3, 1, 2, 7, 5])
    documents = np.array([[4, 0, 9], [2, 1, 0], [6, 6, 6], [1, 0, 0], [8, 3, 0]])
    # (3, 1), (2, 7), (5): 2 x 3 + 4 x 9, 2 x 7 + 4 x 6, 5 + 2 x 8
    assert padded_slots(queries, documents, 2) == 42 + 38 + 21
    assert padded_slots(queries, documents, 16) == 5 * 7 + 10 * 9


def test_the_page_is_whole_and_obeys_no_text(small, tmp_path):
    write_beir(tmp_path / "beir", {"q": ATTACK}, {"d": f"{ATTACK} twice"}, "test")
    report = inspect(*small, against=[str(tmp_path / "beir")], log=lambda line: None)
    root = ET.fromstring(page(report))
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert "script" not in tags and tags >= {"table", "svg", "rect", "pre"}
    names = {name for element in root.iter() for name in element.attrib}
    assert not [name for name in names if name in ("src", "href", "action") or name.startswith("on")]
    texts = [text for element in root.iter() for text in (element.text, element.tail) if text]
    # Beside each other in the table of overlaps; the samples are of other rows.
    assert "<i>en" in texts and texts.count(ATTACK) == 2 and any("a<b>.jsonl:" in text for text in texts)
    assert any("\u241b" in text for text in texts) and not any("\x1b" in text for text in texts)
    bars = [float(element.get("width")) for element in root.iter() if element.tag.endswith("rect")]
    assert min(bars) > 0 and max(bars) <= 640

    assert [
        line for line in root.iter() if "".join(line.itertext()).startswith("scores: positives, negatives;")
    ]
    ET.fromstring(page({**report, "scores": None, "packing": [], "padded": []}))  # of rows that do not fit

    lines = []
    print_report(report, lines.append)
    assert all(line.isprintable() for line in lines)
    assert [line.split() for line in lines if line.startswith("  documents ")][-1][1:] == [
        "14",
        "1",
        "6",
        "13",
    ]


def brute_force(texts: list[str]) -> set[tuple[int, int]]:
    """Pairs i < j of ASCII texts without punctuation that have 4/5 of their pairs of words in common."""
    sets = [set(pairwise(text.split())) for text in texts]
    return {
        (i, j)
        for j in range(len(texts))
        for i in range(j)
        if 5 * len(sets[i] & sets[j]) >= 4 * len(sets[i] | sets[j])
    }


def shown(texts: list[str], places: list[int], sign) -> NearIndex:
    index = NearIndex(np.array(places), texts.__getitem__, sign, is_own=True)
    for start in range(0, len(texts), 7):
        index.show(start, texts[start : start + 7], sign(texts[start : start + 7]))
    return index


def test_near_duplicates_are_those_of_brute_force():
    """With edits of sizes around the bound, and more copies of a text than a bucket is looked through."""
    rng, sign = random.Random(1), signer()
    vocabulary = [f"w{i}" for i in range(300)]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randint(2, 40))) for _ in range(40)]
    for original in texts[:30]:
        copy = original.split()
        for _ in range(rng.randint(1, 4)):
            copy[rng.randrange(len(copy))] = rng.choice(vocabulary)
        texts.append(" ".join(copy))
    texts += [f"{' '.join(vocabulary[:30])} {end}" for end in vocabulary[100:130]]
    rng.shuffle(texts)
    pairs = brute_force(texts)
    assert 30 < len({i for pair in pairs for i in pair}) < 70
    index = shown(texts, list(range(len(texts))), sign)
    assert index.found.keys() == {i for pair in pairs for i in pair}
    for place, (other, same) in index.found.items():
        assert (min(place, other), max(place, other)) in pairs and same == similarity(
            texts[place], texts[other]
        )


def test_a_sample_is_compared_with_all():
    """Each sampled text has its twin outside of the sample, and is shown before or after it."""
    rng, sign = random.Random(2), signer()
    texts = [" ".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=30)) for _ in range(40)]
    texts += [f"{text} more" for text in texts[:20]]
    sample = [*range(10), *range(50, 60), 30, 31, 32]
    index = shown(texts, sample, sign)
    assert {place: other for place, (other, _) in index.found.items()} == {
        **{i: i + 40 for i in range(10)}, **{i: i - 40 for i in range(50, 60)},
    }  # fmt: skip


def test_texts_of_an_evaluation_set_are_all_found_by_one_text():
    """More than a bucket is looked through."""
    sign, words = signer(), " ".join(f"w{i}" for i in range(30))
    texts = [f"{words} end{i}" for i in range(20)] + [
        "another text",
        f"{words} not these words at all or else",
    ]
    index = NearIndex(np.arange(len(texts)), texts.__getitem__, sign, is_own=False)
    for first, shown in ((5, ["none like it", "another one"]), (7, [f"{words} shown"])):
        index.show(first, shown, sign(shown))
    assert index.found == {place: (7, similarity(texts[0], f"{words} shown")) for place in range(20)}


def test_words_of_scripts_without_spaces_are_letters():
    assert similarity("神经网络如何学习呢", "神经网络如何学习吗") == pytest.approx(7 / 9)
    assert similarity("Neural  NETWORKS learn.", "neural networks, learn") == 1.0
    assert similarity("...", "...") == 1.0 and similarity("?", "neural") == 0.0


def test_what_is_missing_is_said_before_anything_is_read(tmp_path, monkeypatch):
    beir, rows = tmp_path / "beir", tmp_path / "rows.jsonl"
    write_beir(beir, {"q": "a"}, {"d": "b"}, "dev")
    rows.write_text("not read")
    data = DataConfig(datasets=[DatasetConfig(path=str(rows))])
    check(data, [f"{beir}:dev"], "")
    (tmp_path / "rows.json").symlink_to(rows)
    (tmp_path / "report.html").symlink_to(beir / "corpus.jsonl")
    for against, output, message in [
        ([str(beir)], "", "test.tsv (or .gz) does not exist; splits there: dev"),
        ([f"{beir}:dev", f"{tmp_path}/none"], "", "none is no BEIR or dataset folder"),
        ([str(rows)], "", "rows.jsonl is no BEIR or dataset folder"),
        ([], str(rows / "report.json"), "rows.jsonl"),
        ([], f"{tmp_path}/rows.json", f"{tmp_path}/rows.json is read (as {rows}), and would be written over"),
        ([f"{beir}:dev"], f"{tmp_path}/report.json", "report.html is read"),
    ]:
        with pytest.raises(UserError) as error:
            check(data, against, output)
        assert message in str(error.value)
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(UserError, match=r"pip install 'nemo_embed_core\[inspect\]'"):
        check(data, [], "")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"output": "r.json"}, "--output and --against are of --inspect true"),
        ({"against": ["beir"]}, "--output and --against are of --inspect true"),
        ({"inspect": True, "output": "r.html"}, r"output=r.html must end in .json"),
        ({"inspect": True, "tokenizer": "", "dataset": "out"}, "give --tokenizer"),
        ({"inspect": True, "data": DataConfig(store="0123")}, "a store alone has none"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    data = DataConfig(datasets=[DatasetConfig(path="rows.jsonl")])
    with pytest.raises(UserError, match=message):
        PrepareConfig(**{"tokenizer": "folder", "data": data, **options})


def test_the_launcher_writes_both_files(server, tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    datasets = json.dumps([{"path": str(tmp_path / "rows.jsonl")}])
    outcome = server.launch([
        "launch/prepare.py", "--tokenizer", str(tmp_path / "tokenizer"), "--inspect", "true", "--output",
        str(tmp_path / "report.json"), "--data.datasets", datasets, "--data.cache_dir",
        str(tmp_path / "cache"),
    ])  # fmt: skip
    assert outcome.code == 0, outcome.output
    assert f"as the model sees {tmp_path / 'rows.jsonl'}:" in outcome.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["duplicates"]["documents"] == {"of": 14, "exact": 1, "near": 6, "near_of": 13}
    assert ET.parse(tmp_path / "report.html").getroot().tag == "html"
