"""The page of a pipeline: what it says of figures that are made up; nothing of it is from elsewhere."""

from __future__ import annotations

import copy
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
from pipelines import write_documents

from nemo_embed_core.config import SynthesizeConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.pipeline import report
from nemo_embed_core.pipeline.page import lines, page
from nemo_embed_core.synthesize import write_self_pairs

EVIL = '<script src="http://x.example/a.js"></script> & "quoted" \x07 \x1b[2J'
SCORE = {"score": 0.25, "low": 0.2, "high": 0.3125}
FOUND: dict[str, Any] = {
    "documents": f"docs/{EVIL}", "base": f"base {EVIL}", "method": "lora", "layers": 0, "task": EVIL,
    "held_out": 0.1, "metric": "ndcg_at_10", "queries": 1234, "is_better": True,
    "scores": {"base": SCORE, "tuned": {"score": 0.4321, "low": 0.4, "high": 0.4567},
               "BM25": {"score": 0.5, "low": None, "high": None}},
    "metrics": {"base": {"ndcg_at_10": 0.25, "recall_at_100": 0.75}, "tuned": {"ndcg_at_10": 0.4321},
                "BM25": {}},
    "differences": [
        {"of": "tuned", "minus": "base", "score": 0.1821, "low": 0.1234, "high": 0.2345, "p": 1e-4,
         "p_holm": 3e-4},
        {"of": "BM25", "minus": "base", "score": -0.25, "low": None, "high": None, "p": None, "p_holm": None},
    ],
    "notes": [EVIL], "overlap": "queries 1.30%, documents 40.00%",
    "splits": {"train": {"files": 812, "documents": 9001, "queries": 7007},
               "test": {"files": 91, "documents": 1002, "queries": 808}},
    "written": {"requests": {"accepted": 61, "refusal": 9}, "replies": 70, "spent": 1.5, "tokens": [1, 2]},
    "mining": {"pairs": {"queries": 7007, "documents": 9001, "threshold": 0.95, "num_negatives": 2,
                         "negatives": 13013, "with_no_negatives": 17, "trivial_negatives": 1,
                         "histogram": {"edges": [0.0, 0.25, 0.5, 0.75, 1.0], "positives": [1, 3, 2, 0],
                                       "negatives": [0, 0, 0, 0]}}},
    "curve": {"step": [1, 11, 21], "loss": [3.25, 2.0, 1.125], "accuracy": [None, 0.5, 0.75]},
    "samples": [{"query": EVIL, "documents": [EVIL * 30], "negatives": [], "of": "a.md#3"}],
    "examples": {"gains": [{"query": EVIL, "scores": {"base": 0.0, "tuned": 0.875},
                            "first": {"base": EVIL, "tuned": "right"}}], "losses": []},
    "checks": {"check": ["attention: bidirectional in 8 of 8 cases", EVIL]},
    "model": "runs/mine/model", "serving": f"- vllm: accepted {EVIL}",
    "stages": [{"name": "tuned", "seconds": 77.7, "code": "this code", "folder": "steps/tuned-1",
                "command": f"nemo-embed train {EVIL}"}],
    "alarms": [{"of": "scores", "says": EVIL}],
}  # fmt: skip


def texts(found: dict[str, Any]) -> tuple[str, str]:
    """(the page, all that a reader sees of it)."""
    made = page(found)
    tree = ElementTree.fromstring(made.removeprefix("<!DOCTYPE html>\n"))  # which a stray < would break
    return made, " ".join("".join(tree.itertext()).split())


def test_texts_are_shown_as_they_are_and_nothing_is_loaded():
    made, shown = texts(FOUND)
    assert not re.search(r"<(script|link|img|iframe)\b|\b(src|href)=(?!&quot;)|@import|url\(", made)
    assert shown.count("<script") >= 12 and "\x1b" not in made and "&amp;" not in shown
    tags = {element.tag for element in ElementTree.fromstring(made.partition("\n")[2]).iter()}
    assert "script" not in tags and {"{http://www.w3.org/2000/svg}polyline", "pre", "table"} <= tags


def test_figures_are_those_that_were_found():
    made, shown = texts(FOUND)
    for said in (
        "On 1,234 queries", "is better than its base", "ndcg@10 is 0.4321 [0.4000, 0.4567]",
        "against 0.2500 [0.2000, 0.3125]", "a difference of +0.1821 [+0.1234, +0.2345], p 0.0003",
        "BM25 has 0.5000.", "recall@100", "0.7500", "queries 1.30%, documents 40.00%", "9,001", "812",
        "13,013 negatives of 7,007 queries", "17 queries have none", "adapters", "steps 1 to 21",
        "loss: 3.25 to 1.125", "accuracy: 0.5 to 0.75, least 0.5, most 0.75", "70 replies, 1.5000 spent",
        "0.8750", "attention: bidirectional in 8 of 8 cases", "Transformer('runs/mine/model')",
        "tuned78steps/tuned-1",
    ):  # fmt: skip
        assert said in shown, said
    # Figures stand to the right below their heads, p before Holm's correction too; texts to the left.
    assert "<td>&lt;0.0002</td>" in made and '<th class="wide">says</th>' in made and "<th>p</th>" in made
    assert re.search(r"<details><summary>Their commands</summary><pre>nemo-embed train .*</details>", made)
    assert list(lines(FOUND))[:4] == [
        "1,234 held-out queries over 1,002 chunks, ndcg@10:", "  base   0.2500 [0.2000, 0.3125]",
        "  tuned  0.4321 [0.4000, 0.4567]", "  BM25   0.5000",
    ]  # fmt: skip
    worse = copy.deepcopy(FOUND) | {"is_better": False, "alarms": [], "written": {}, "overlap": ""}
    shown = texts(worse)[1]
    assert "is not shown to be better than its base" in shown and "No alarm sounded." in shown


def test_bars_of_two_kinds_are_told_apart():
    both = copy.deepcopy(FOUND)
    both["mining"]["pairs"]["histogram"]["negatives"] = [5, 0, 3, 0]
    made, shown = texts(both)
    assert "cosines with the query: positives, negatives; highest bar 62.5%" in shown
    colour = dict(re.findall(r'<tspan class="(\w+)">(\w+)</tspan>', made))
    assert colour == {"first": "positives", "second": "negatives"}
    assert [made.count(f'<rect class="{kind}"') for kind in colour] == [3, 2]
    assert "cosines with the query; highest bar 50.0%" in texts(FOUND)[1]  # of one kind alone


@pytest.mark.parametrize(
    "score, p, better", [(0.1, 0.009, True), (0.1, 0.011, False), (-0.1, 0.0001, False), (0.1, None, False)]
)
def test_better_is_above_with_less_than_one_in_a_hundred(score, p, better):
    assert report._is_better({"score": score, "p": 0.001, "p_holm": p}) is better


def test_alarms_of_all_stages_stand_together(tmp_path):
    run = tmp_path / "run" / "step-00000002"
    run.mkdir(parents=True)
    (run / "manifest.json").write_text('{"step": 2}')
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1, "loss": 1, "alarms": {"no_negatives": "x"}}\n')
    mining = {"with_no_negatives": 40, "with_fewer_than_k": 20, "num_negatives": 2, "queries": 100,
              "documents": 500, "threshold": 0.5, "trivial_negatives": 51, "negatives": 100}  # fmt: skip
    flat, mixed = ({"alarms": [{"kind": kind, "says": "so"}]} for kind in ("collapse", "confusion"))
    scores = {"base": mixed, "tuned": {**flat, "overlap": {"queries": {"share": 0.06}}}}
    found = {
        "is_better": False,
        "checks": {"check-gguf": ["fine", "tei: wrong, not run; by its source: causal"]},
    }
    label = {"base": "base", "tuned": "tuned"}
    alarms = list(report._alarms(found, scores, label, {"pairs": mining}, tmp_path / "run"))
    assert [(alarm["of"], alarm["says"].split(":")[0].split()[0]) for alarm in alarms] == [
        ("scores", "the"), ("tuned", "collapse"), ("training", "no_negatives"),
        ("mining of pairs", "strict_threshold"), ("mining of pairs", "51%"), ("scores", "6.0%"),
        ("check-gguf", "tei"),
    ]  # fmt: skip
    calm = {"is_better": True, "checks": {"check": ["vllm: accepted, not run"]}}
    easy = mining | {"with_no_negatives": 0, "trivial_negatives": 50}
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1, "loss": 1}\n')
    quiet = {"base": {}, "tuned": {"overlap": {"queries": {"share": 0.05}}}}
    assert not list(report._alarms(calm, quiet, label, {"pairs": easy}, tmp_path / "run"))


def test_a_document_in_both_splits_is_refused(tmp_path):
    write_documents(tmp_path / "docs", 9)
    places = {"documents": str(tmp_path / "docs"), "output": str(tmp_path / "out")}
    config = SynthesizeConfig.from_dict({**places, "self_pairs": {"held_out": 0.4}})
    write_self_pairs(config, lambda _: None)
    train, test = tmp_path / "out/train", tmp_path / "out/test"
    counts = report.splits({"train": train, "test": test})
    assert counts["train"]["files"] + counts["test"]["files"] == 9
    with pytest.raises(UserError, match="documents are in train and in test, first guide-"):
        report.splits({"train": train, "test": train})
