"""launch/evaluate.py --compare: what is computed from reports, what is refused, and how it is shown."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_embed_core.config import EvaluateConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation.compare import compare
from nemo_embed_core.evaluation.compare_page import present
from nemo_embed_core.evaluation.results import write_rows


def write_report(file: Path, scores: dict[str, list[float]], languages: str = "", **facts: Any) -> Path:
    """A report as launch/evaluate.py writes it; a model is NAME or NAME=DIGEST."""
    file.parent.mkdir(parents=True, exist_ok=True)
    report = {}
    for number, (name, values) in enumerate(scores.items()):
        model, _, digest = name.partition("=")
        rows = [
            {
                "id": f"q{i}",
                "ndcg_at_10": value,
                "found": [f"d{i}", "d0"],
                "judged": {"d7": 1, "d8": 2},
                "language": (languages or " ")[i % len(languages or " ")].strip() or None,
                "text": f"query *{i}*",
                "texts": {f"d{i}": f"found by {model}", "d8": "relevant"},
            }
            for i, value in enumerate(values)
        ]
        known = {
            "name": file.stem,
            "type": "Retrieval",
            "main_score": "ndcg_at_10",
            "digest": "x",
            "split": "test",
        }
        about = {"prompts": {"query": "q: "}, "query_max_length": 64, "document_max_length": 128}
        own = {key: value for key, value in facts.items() if key in about}
        report[model] = {
            "ndcg_at_10": round(float(np.mean(values)), 5),
            **({} if model == "bm25" else {**about, "digest": digest or model, **own}),
            "data": {
                **known,
                "ignore_identical_ids": False,
                **{k: v for k, v in facts.items() if k not in own},
            },
            **write_rows(file, number, rows),
        }
    file.write_text(json.dumps(report))
    return file


def values_of(seed: int, mean: float, units: int = 40) -> list[float]:
    """Some 0, some 1, others between."""
    return np.random.default_rng(seed).normal(mean, 0.4, size=units).clip(0, 1).round(4).tolist()


@pytest.fixture
def reports(tmp_path) -> Path:
    """Three models on ten tasks, of which c did not run the last and a wins the first alone."""
    for t in range(10):
        shift = 0.3 if t == 0 else 0.0
        scores = {"a": values_of(t, 0.4 + shift), "b": values_of(t + 10, 0.6), "c": values_of(t + 20, 0.5)}
        if t == 9:
            del scores["c"]
        kind = "Retrieval" if t < 4 else "Reranking"
        write_report(tmp_path / f"t{t}.json", scores, "ddde", type=kind)
    return tmp_path


def means(folder: Path, model: str) -> np.ndarray:
    files = sorted(folder.glob("t?.json"))
    return np.array([json.loads(f.read_text()).get(model, {}).get("ndcg_at_10", np.nan) for f in files])


def test_means_ranks_and_differences_are_of_the_reports(reports):
    found = compare([str(reports)], draws=2000)
    assert found["models"] == ["a", "b", "c"] and list(found["tasks"]) == [f"t{t}" for t in range(10)]
    a, b, c = (means(reports, model) for model in "abc")
    own = found["overall"]
    assert own["a"]["mean"]["score"] == pytest.approx(a.mean())
    assert own["b"]["mean_of_types"]["score"] == pytest.approx((b[:4].mean() + b[4:].mean()) / 2)
    assert own["c"]["mean"]["score"] is own["c"]["mean"]["low"] is own["c"]["types"]["Reranking"] is None
    assert own["c"]["types"]["Retrieval"] == pytest.approx(c[:4].mean())
    # A task that c did not run gives it nothing, and the others a point more than they have better models.
    points = [float(np.nansum([(x > y).sum() for y in (a, b, c)])) for x in (a, b, c)]
    points = [p + (model != "c") for p, model in zip(points, "abc", strict=True)]
    assert [own[model]["borda"]["points"] for model in "abc"] == points
    assert own["b"]["borda"]["rank"] == 1 and own["b"]["borda"]["low"] <= 1 <= own["b"]["borda"]["high"]
    ab, ac, _ = found["pairs"]
    assert (ab["a"], ab["b"]) == ("a", "b") and ab["difference"] == pytest.approx((b - a).mean())
    assert list(ac["tasks"]) == [f"t{t}" for t in range(9)] and ac["difference"] == pytest.approx(
        (c - a)[:9].mean()
    )
    assert ab["tasks"]["t0"]["score"] == pytest.approx(b[0] - a[0]) and ab["tasks"]["t0"]["score"] < 0


def test_intervals_and_p_are_near_students_of_the_paired_differences(reports):
    """An oracle without draws: queries are paired, tasks stand apart, their mean weighs each alike."""
    from scipy.stats import ttest_rel

    found = compare([str(reports)], draws=5000)
    a, b = (
        [values_of(t + shift, 0.6 if shift else 0.4 + 0.3 * (t == 0)) for t in range(10)] for shift in (0, 10)
    )
    differences_Tn = np.array(b) - np.array(a)
    pair = found["pairs"][0]
    for t, row in enumerate(differences_Tn):
        half = 2.023 * row.std(ddof=1) / math.sqrt(40)
        own = pair["tasks"][f"t{t}"]
        assert [own["low"], own["high"]] == pytest.approx(
            [row.mean() - half, row.mean() + half], abs=0.1 * half
        )
        assert own["p"] == pytest.approx(ttest_rel(b[t], a[t]).pvalue, abs=0.02)
        assert own["p"] <= own["p_holm"] <= 1
    half = 2.0 * math.sqrt((differences_Tn.var(axis=1, ddof=1) / 40).sum()) / 10
    over, mean = pair["over_queries"], differences_Tn.mean()
    assert [over["low"], over["high"]] == pytest.approx([mean - half, mean + half], abs=0.1 * half)
    tasks_T = differences_Tn.mean(axis=1)
    half = 2.262 * tasks_T.std(ddof=1) / math.sqrt(10)
    over = pair["over_tasks"]
    assert [over["low"], over["high"]] == pytest.approx([mean - half, mean + half], abs=0.3 * half)
    assert over["p"] == pytest.approx(ttest_rel(tasks_T, 0 * tasks_T).pvalue, abs=0.04)
    scores = found["tasks"]["t3"]["scores"]["a"]
    assert scores["low"] < scores["score"] < scores["high"] and scores["score"] == round(np.mean(a[3]), 5)


def test_queries_are_paired_by_their_ids_and_a_large_task_weighs_no_more_than_a_small_one(tmp_path):
    first = np.array(values_of(0, 0.5, 200))
    near = (first + np.random.default_rng(1).normal(0.03, 0.1, size=200)).clip(0, 1)
    scores = {"a": first.tolist(), "b": near.tolist()}
    write_report(tmp_path / "1/t.json", {"a": scores["a"]})
    file = write_report(tmp_path / "2/t.json", {"b": scores["b"]})
    rows = [json.loads(line) for line in file.with_name("t.queries-0.jsonl").read_text().splitlines()]
    report = json.loads(file.read_text())
    report["b"] |= write_rows(file, 0, rows[::-1])
    file.write_text(json.dumps(report))
    small = {"a": values_of(5, 0.5, 12), "b": values_of(6, 0.5, 12)}
    write_report(tmp_path / "u.json", small)
    pair = compare([str(tmp_path)], draws=4000)["pairs"][0]
    paired = [np.array(own["b"]) - np.array(own["a"]) for own in (scores, small)]
    half = 1.972 * paired[0].std(ddof=1) / math.sqrt(200)
    own = pair["tasks"]["t"]
    assert own["high"] - own["low"] == pytest.approx(2 * half, rel=0.08)
    z = sum(d.mean() for d in paired) / math.sqrt(sum(d.var() / len(d) for d in paired))
    assert pair["over_queries"]["p"] == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=0.05)
    assert own["p"] < 0.5 * pair["over_queries"]["p"], "the large task alone says more"


def test_a_seed_gives_the_same_comparison_whatever_stands_beside_it(reports, tmp_path):
    whole = compare([str(reports)], draws=1000, seed=4)
    assert compare([str(reports)], draws=1000, seed=4) == whole
    assert compare([str(reports)], draws=1000, seed=5)["pairs"] != whole["pairs"]
    alone = compare([str(reports / "t2.json")], draws=1000, seed=4)
    assert alone["tasks"]["t2"] == whole["tasks"]["t2"]
    one = alone["pairs"][0]["tasks"]["t2"]
    assert {k: one[k] for k in ("low", "high", "p")} == {
        k: whole["pairs"][0]["tasks"]["t2"][k] for k in ("low", "high", "p")
    }
    assert alone["pairs"][0]["over_tasks"] is None and alone["leave_one_task_out"] == {}
    assert alone["settings"]["notes"][0].startswith("1 tasks say little of other tasks")
    six = compare([str(reports / f"t{t}.json") for t in range(6)], draws=1000)["pairs"][0]["over_tasks"]
    assert six["low"] is None and 2 / 64 <= six["p"] <= 1


def test_a_task_that_decides_the_order_is_found_by_leaving_it_out(tmp_path):
    for t, (a, b) in enumerate([(0.9, 0.1), (0.5, 0.6), (0.3, 0.4), (0.7, 0.5)]):
        write_report(tmp_path / f"t{t}.json", {"a": [a, a], "b": [b, b]})
    found = compare([str(tmp_path)], draws=1000)
    assert [found["overall"][m]["borda"]["rank"] for m in "ab"] == [1, 1]
    left = found["leave_one_task_out"]
    means = {"a": pytest.approx(1.9 / 3), "b": pytest.approx(1 / 3)}
    assert left["t1"] == {"ranks": {"a": 1, "b": 2}, "means": means, "changed": ["b"]}
    assert left["t3"]["changed"] == ["a"] and left["t3"]["ranks"] == {"a": 2, "b": 1}


def test_ranks_have_intervals_over_tasks_and_queries(tmp_path):
    """Sure where each task says the same with little noise, open where tasks or queries do not."""
    for t in range(8):
        swap = 0.2 if t % 2 else -0.2
        steady, noisy = np.array(values_of(t, 0.3)) / 9, np.array(values_of(t + 50, 0.5))
        near = (noisy + np.random.default_rng(t).normal(0, 0.3, size=40)).clip(0, 1)
        scores = {"low": steady, "x": noisy, "y": near, "z": (noisy + swap).clip(0, 1)}
        write_report(tmp_path / f"t{t}.json", {name: values.tolist() for name, values in scores.items()})
    own = compare([str(tmp_path)], draws=1000)["overall"]
    assert own["low"]["borda"] == {"points": 0.0, "rank": 4, "low": 4, "high": 4}
    for model in "xyz":
        borda = own[model]["borda"]
        assert borda["low"] == 1 and borda["high"] >= 2 and borda["low"] <= borda["rank"] <= borda["high"]


def test_a_task_without_scores_of_queries_counts_in_means_and_ranks_without_intervals(tmp_path, capsys):
    """Clustering is the same in every draw: beside one other task, the mean's interval is half as wide."""
    scores = {"a": values_of(0, 0.4), "b": values_of(1, 0.5)}
    write_report(tmp_path / "t.json", scores)
    alone = compare([str(tmp_path)], draws=1000)["pairs"][0]
    write_report(
        tmp_path / "u.json", {"a": [0.25, 0.25], "b": [0.75, 0.75]}, statistic="none", type="Clustering"
    )
    found = present(EvaluateConfig(compare=[str(tmp_path)], draws=1000))
    (pair,) = found["pairs"]
    assert pair["tasks"]["u"] == {"score": 0.5, "low": None, "high": None, "p": None, "p_holm": None}
    assert pair["difference"] == pytest.approx((alone["difference"] + 0.5) / 2)
    ends = [(alone["tasks"]["t"][end] + 0.5) / 2 for end in ("low", "high")]
    assert [pair["over_queries"][end] for end in ("low", "high")] == pytest.approx(ends)
    assert pair["over_queries"]["p"] == pytest.approx(2 / 1001), "no draw is below 0"
    assert found["overall"]["b"]["borda"] == {"points": 2.0, "rank": 1, "low": 1, "high": 1}
    assert [entry["task"] for entry in found["differ_most"]] == ["t"]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.split()[:2] == ["u", "+0.5000"])
    assert line.split()[2:] == ["-", "-"]


def test_languages_stand_apart(reports):
    spoken = compare([str(reports / "t1.json")], draws=2000)["tasks"]["t1"]["languages"]
    assert {language: found["queries"] for language, found in spoken.items()} == {"d": 30, "e": 10}
    a, b = values_of(1, 0.4), values_of(11, 0.6)
    assert spoken["e"]["scores"]["a"]["score"] == pytest.approx(np.mean(a[3::4]))
    difference = spoken["e"]["differences"]["b"]
    assert difference["score"] == pytest.approx(np.mean(b[3::4]) - np.mean(a[3::4]))
    paired = np.array(b[3::4]) - np.array(a[3::4])
    assert difference["high"] - difference["low"] == pytest.approx(
        2 * 2.262 * paired.std(ddof=1) / math.sqrt(10), rel=0.15
    )


def test_queries_that_differ_most_are_shown_with_what_was_found(tmp_path):
    write_report(tmp_path / "t.json", {"a": [0.5, 0.2, 0.9, 0.4], "b": [0.5, 0.3, 0.1, 0.9]})
    (found,) = compare([str(tmp_path)], draws=1000)["differ_most"]
    assert [query["id"] for query in found["losses"]] == ["q2"] and (found["better"], found["worse"]) == (
        2,
        1,
    )
    assert [query["id"] for query in found["gains"]] == ["q3", "q1"]
    query = found["losses"][0]
    assert query["models"] == {
        "a": {"score": 0.9, "found": ["d2", "d0"]},
        "b": {"score": 0.1, "found": ["d2", "d0"]},
    }
    assert (
        query["text"] == "query *2*"
        and query["judged"] == {"d7": 1, "d8": 2}
        and query["texts"]["d8"] == "relevant"
    )


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("facts", "named", "message"),
    [
        ({"digest": "y"}, "data", r't: data differ: a, bm25 \["x", false\]; b \["y", false\]'),
        ({"ignore_identical_ids": True}, "data", "data differ"),
        ({"split": "dev"}, "split", 't: split differ: a, bm25 "test"; b "dev"'),
        ({"document_max_length": 64}, "lengths", r"t: lengths differ: a \[64, 128\]; b \[64, 64\]"),
        ({"prompts": {"query": "Instruct: "}}, "prompts", 'prompts differ: a {"query": "q: "}; b '),
    ],
)  # fmt: skip
def test_other_settings_are_refused_unless_they_are_named(tmp_path, facts, named, message):
    scores = values_of(0, 0.5)
    files = [
        write_report(tmp_path / "1/t.json", {"a": scores, "bm25": scores}),
        write_report(tmp_path / "2/t.json", {"b": scores}, **facts),
    ]
    with pytest.raises(UserError, match=rf"(?s){message}.*--allow {named}$"):
        compare([str(file) for file in files], draws=1000)
    others = [name for name in ("data", "split", "lengths", "prompts") if name != named]
    with pytest.raises(UserError, match=message):
        compare([str(file) for file in files], draws=1000, allow=others)
    notes = compare([str(file) for file in files], draws=1000, allow=[named])["settings"]["notes"]
    assert re.search(message, notes[0]), "words alone, bm25, have no prompts and lengths to differ in"


def test_of_other_data_only_the_queries_that_all_have_are_compared(tmp_path):
    write_report(tmp_path / "1/t.json", {"a": [0.1, 0.2, 0.9]})
    write_report(tmp_path / "2/t.json", {"b": [0.3, 0.2, 0.0, 1.0, 1.0]}, digest="y")
    found = compare([str(tmp_path)], draws=1000, allow=["data"])
    assert found["tasks"]["t"]["queries"] == 3
    assert "t: only the 3 queries that all have; without: b 2" in found["settings"]["notes"]
    assert found["overall"]["b"]["mean"]["score"] == pytest.approx(0.5 / 3)
    assert found["pairs"][0]["tasks"]["t"]["score"] == pytest.approx(0.5 / 3 - 0.4)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("one model", "results of 1 model; a comparison needs two"),
        ("twice", r"a has two results of t: split test in .*1/t.json, split dev in .*2/t.json"),
        ("other weights", "a stands for several weights or precisions: one in .*1/t.json, two in"),
        ("other metric", "t has results of main_score mrr and ndcg_at_10"),
        ("edited rows", r"t.queries-1.jsonl is not what .*t.json was written with"),
        ("no rows file", r"t.queries-0.jsonl, the scores of single queries, cannot be read: No such file"),
        ("edited figure", "a has ndcg_at_10 0.9, and its queries the mean 0.500000"),
        ("old report", "a has no scores of single queries; evaluate it again with --output"),
        ("no report", "t.json is no report of launch/evaluate.py --output"),
        ("empty folder", "has no report of launch/evaluate.py --output"),
        ("no common queries", "t: 1 queries are in all results; intervals need at least two"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(tmp_path, spoil, message):
    file = write_report(tmp_path / "1/t.json", {"a=one": [0.5, 0.5], "b": [0.1, 0.2]})
    paths, other, allow = [str(file)], tmp_path / "2/t.json", []
    report = json.loads(file.read_text())
    if spoil == "one model":
        paths = [str(write_report(other, {"a": [0.5, 0.5]}))]
    elif spoil == "twice":
        paths.append(str(write_report(other, {"a=one": [0.5, 0.5]}, split="dev")))
    elif spoil == "other weights":
        paths.append(str(write_report(other, {"a=two": [0.5, 0.5]}, name="u")))
    elif spoil == "other metric":
        write_report(other, {"c": [0.5, 0.5]})
        changed = json.loads(other.read_text())
        changed["c"]["data"]["main_score"], changed["c"]["mrr"] = "mrr", 0.5
        rows = other.with_name("t.queries-0.jsonl")
        changed["c"] |= write_rows(
            other, 0, [{**json.loads(line), "mrr": 0.5} for line in rows.read_text().splitlines()]
        )
        other.write_text(json.dumps(changed))
        paths.append(str(other))
    elif spoil == "edited rows":
        rows = file.with_name("t.queries-1.jsonl")
        rows.write_text(rows.read_text().replace("0.1", "0.3"))
    elif spoil == "no rows file":
        file.with_name("t.queries-0.jsonl").unlink()
    elif spoil == "edited figure":
        report["a"]["ndcg_at_10"] = 0.9
    elif spoil == "old report":
        del report["a"]["per_query"]
    elif spoil == "no report":
        report = {"models": ["a"]}
    elif spoil == "empty folder":
        (tmp_path / "3").mkdir()
        paths = [str(tmp_path / "3")]
    else:
        paths.append(str(write_report(other, {"c": [0.5]}, digest="y")))
        allow = ["data"]
    file.write_text(json.dumps(report))
    with pytest.raises(UserError, match=message):
        compare(paths, draws=1000, allow=allow)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compare": ["a.json"], "data": "d"}, "compare reads reports, and data is of an evaluation"),
        ({"compare": ["a.json"], "training": ["d"]}, "compare reads reports, and training is of"),
        ({"compare": ["a.json"], "base": "m"}, "compare reads reports, and base is of"),
        ({"compare": ["a.json"], "other_task": "t"}, "compare reads reports, and other_task is of"),
        ({"compare": ["a.json"], "allow": ["length"]}, "allow=length must be one of data, split, len"),
        ({"data": "d", "plot": "a.png"}, "allow and plot belong to --compare"),
        ({"compare": ["a.json"], "draws": 999}, "draws=999 must be at least 1,000"),
    ],
)  # fmt: skip
def test_options_that_do_not_belong_together_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        EvaluateConfig(**options)


# ------------------------------------------------------------------------------------------ how it is shown


def test_the_launcher_prints_tables_and_writes_json_markdown_and_a_plot(
    launcher, reports, tmp_path, capsys, monkeypatch
):
    (reports / "other.json").write_text("{}")
    output, plot = tmp_path / "out" / "compared.json", tmp_path / "out" / "compared.png"
    options = ["--compare", str(reports), "--draws", "1000", "--output", str(output), "--plot", str(plot)]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *options])
    launcher.main()
    said = capsys.readouterr().out
    assert f"{reports / 'other.json'} is no report and was not read" in said
    report = json.loads(output.read_text())
    assert report == compare([str(reports / f"t{t}.json") for t in range(10)], draws=1000)
    a = report["overall"]["a"]["mean"]
    shown = f"{a['score']:.4f} [{a['low']:.4f}, {a['high']:.4f}]"
    line = next(line for line in said.splitlines() if "mean over tasks" in line)
    assert shown in line and line.split()[-1] == "-", "c did not run all tasks"
    page = output.with_suffix(".md").read_text()
    assert shown in page.replace("\\", "") and r"**query \*" in page and "minus a" in page
    own = report["pairs"][0]["tasks"]["t0"]
    row = f"t0 | {own['score']:+.4f} [{own['low']:+.4f}, {own['high']:+.4f}] | {own['p']:.4f} | "
    assert f"{row}{own['p_holm']:.4f} |" in page.replace("\\", "")
    assert all(line.count("|") == line.replace("\\|", "").count("|") for line in page.splitlines())
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    config = EvaluateConfig(compare=[str(tmp_path / "nothing.json")], plot=str(tmp_path / "a.png"))
    with pytest.raises(UserError, match=r"plot needs matplotlib: pip install 'nemo_embed_core\[demo\]'"):
        present(config)
