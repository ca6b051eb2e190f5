"""launch/pipeline.py on toys: real stages as forks, killed and resumed, and what its report says of them."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pipelines import options, piped, preload

from nemo_embed_core.files.durable import sha256_file, sha256_folder

NAMES = ["pairs", "mine", "tuned", "export", "scores", "compared", "check"]


def ended(output: str) -> list[str]:
    """The stages that a call has done."""
    return [line.split()[1].rpartition("-")[0] for line in output.splitlines() if line.startswith("[")]


def folder_of(out: Path, name: str) -> Path:
    (folder,) = out.glob(f"steps/{name}-????????????")
    return folder


def placeless(file: Path, out: Path) -> str:
    """Its text, wherever the output is."""
    return file.read_text().replace(str(out), "OUT")


def products(out: Path) -> dict[str, str]:
    """Digests of all that has no time in it."""
    run = max(folder_of(out, "tuned").glob("run/step-*"))
    found = {
        "pairs": sha256_folder(folder_of(out, "pairs") / "data"),
        "mined": sha256_folder(folder_of(out, "mine") / "mined"),
        "weights": sha256_file(next(folder_of(out, "export").glob("model/*.safetensors"))),
        "compared": placeless(folder_of(out, "compared") / "compared.json", out),
    }
    for file in sorted(run.glob("*.safetensors")):
        found[f"{run.name}/{file.name}"] = sha256_file(file)
    for file in sorted(folder_of(out, "scores").glob("report.queries-*.jsonl")):
        found[file.name] = sha256_file(file)
    return found


def documents_of(folder: Path) -> set[str]:
    (file,) = folder.glob("corpus*.parquet")
    return {key.split("#")[0] for key in pq.read_table(file)["id"].to_pylist()}


@pytest.mark.dist
def test_documents_become_a_model_and_a_page_and_what_is_done_is_left(tmp_path, server):
    preload(server)
    given = options(tmp_path)
    outcome = server.call(piped, given, env={"NEMO_EMBED_FAIL": "step-done@mine"})
    assert outcome.code == -signal.SIGKILL and ended(outcome.output) == ["pairs"], outcome.output
    outcome = server.call(piped, given)
    assert outcome.code == 0, outcome.output
    assert ended(outcome.output) == NAMES[1:]
    out = tmp_path / "out"

    # The split is by document, and all documents are in one of both.
    sides = [documents_of(folder_of(out, "pairs") / "data" / side) for side in ("train", "test")]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == {f"guide-{i}.md" for i in range(30)}

    # Figures of the page are those of the stages' files.
    found, page = json.loads((out / "report.json").read_text()), (out / "report.html").read_text()
    scores = json.loads((folder_of(out, "scores") / "report.json").read_text())
    compared = json.loads((folder_of(out, "compared") / "compared.json").read_text())
    label = {given["base"]: "base", str(folder_of(out, "export") / "model"): "tuned", "bm25": "BM25"}
    assert list(scores) == list(label)
    for model, name in label.items():
        assert found["metrics"][name]["ndcg_at_10"] == scores[model]["ndcg_at_10"]
        assert found["scores"][name] == compared["tasks"]["held-out"]["scores"][model]
        assert f"<td>{scores[model]['ndcg_at_10']:.4f}</td>" in page
    (pair,) = (e for e in compared["pairs"] if (label[e["a"]], label[e["b"]]) == ("base", "tuned"))
    own = pair["tasks"]["held-out"]
    assert f"{own['score']:+.4f} [{own['low']:+.4f}, {own['high']:+.4f}]" in page
    assert found["is_better"] == (own["score"] > 0 and own["p_holm"] < 0.01)
    steps = [
        json.loads(line) for line in (folder_of(out, "tuned") / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert found["curve"]["loss"] == [m["loss"] for m in steps] and len(steps) == 3
    assert {name: split["files"] for name, split in found["splits"].items()} == {
        "train": len(sides[0]), "test": len(sides[1])
    }  # fmt: skip
    assert not re.search(r"(src|href)=|<script|<link|@import|url\(", page)
    assert "&lt;b&gt;" in page or "&amp; turns quiet" in page
    assert [stage["name"] for stage in found["stages"]] == NAMES
    assert (out / "model").resolve() == folder_of(out, "export") / "model"
    assert any(line.startswith("attention: bidirectional") for line in found["checks"]["check"])
    assert "sentence-transformers: proven" in found["serving"]

    # Given again it does nothing; with other rates what follows from them; the page is of the new run.
    before = products(out)
    outcome = server.call(piped, given)
    assert outcome.code == 0 and ended(outcome.output) == [] and products(out) == before, outcome.output
    outcome = server.call(piped, {**given, "max_queries": 40})
    assert outcome.code == 0 and ended(outcome.output) == ["scores", "compared"], outcome.output
    assert json.loads((out / "report.json").read_text())["queries"] == 40


@pytest.mark.slow
@pytest.mark.dist
def test_killed_at_each_stage_it_ends_with_the_same_bytes(tmp_path, server):
    """Before and behind each stage, in the middle of those that take long, and before the page."""
    preload(server)
    given = {**options(tmp_path), "train": str(tmp_path / "train.yaml"), "steps": 4}
    (tmp_path / "train.yaml").write_text("checkpoint: {every: 1}\n")
    whole = {**given, "output": str(tmp_path / "whole")}
    assert server.call(piped, whole).code == 0
    inside = {
        "pairs": ["dataset.row@3"],
        "mine": ["documents.encoded@0", "searched@0"],
        "tuned": ["step.begin@2", "step.optimizer@3"],
    }
    faults = [
        fault for name in NAMES for fault in (f"step@{name}", *inside.get(name, []), f"step-done@{name}")
    ]
    for fault in [*faults, "pipeline@report"]:
        outcome = server.call(piped, given, env={"NEMO_EMBED_FAIL": fault})
        killed = outcome.code == -signal.SIGKILL or "ended with code -9" in outcome.output
        assert killed, (fault, outcome.output)
    outcome = server.call(piped, given)
    assert outcome.code == 0, outcome.output
    assert products(tmp_path / "out") == products(tmp_path / "whole")

    def timeless(out: Path) -> str:
        return re.sub(r'"seconds": [\d.]+', "", placeless(out / "report.json", out))

    assert timeless(tmp_path / "out") == timeless(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.dist
def test_rows_of_an_endpoint_that_misbehaves_are_neither_lost_nor_paid_twice(tmp_path, server):
    """Killed at a reply and at a request; then a document more, which asks for its own requests alone."""
    from benchmarks.synthesis_server import Server as Endpoint

    pytest.importorskip("openai", reason="the extra [synthesize] (openai) is not installed")
    preload(server)
    server.preload("openai", "nemo_embed_core.synthesize.generate")
    faults = dict.fromkeys(["429", "500", "cut", "half JSON", "refusal", "prose", "missing field"], 0.06)
    out = tmp_path / "out"

    def replies() -> set[str]:
        lines = (out / "answers/journal.jsonl").read_text().splitlines()
        return {e["digest"] for e in map(json.loads, lines) if e["event"] == "reply"}

    with Endpoint(faults) as endpoint:
        model = {"name": "large", "base_url": endpoint.url, "licence": "CC0-1.0", "max_in_flight": 2}
        generate = {"models": [model], "requests": 40, "timeout_s": 60.0, "backoff_s": 0.0}
        given = options(tmp_path, generate=generate | {"tasks": {"document-question": 1.0}})
        for fault in ("journal.reply@*", "journal.sent@*", "journal.lost@*"):
            outcome = server.call(piped, given, env={"NEMO_EMBED_FAIL": fault})
            assert "written ended with code -9" in outcome.output, outcome.output
        have, asked = replies(), dict(endpoint.asked)
        assert have
        outcome = server.call(piped, given)
        assert outcome.code == 0, outcome.output
        assert all(endpoint.asked[digest] == asked[digest] for digest in have)
        lost = {"500", "cut", "half JSON"}  # perhaps paid, says the server: sent again
        again = [d for d, n in endpoint.paid.items() if n > 1 and endpoint.planted[d] not in lost]
        assert len(again) <= 3 * 2  # in flight at a kill
        found = json.loads((out / "report.json").read_text())["written"]
        rows = found["written"]["document-question"]["queries"]
        assert found["replies"] == len(replies()) == 40 and rows == found["requests"]["accepted"] > 20
        mined = folder_of(out, "mine") / "mined/document-question/dataset_metadata.json"
        assert json.loads(mined.read_text())["counts"]["queries"] == rows
        before, asked = replies(), dict(endpoint.asked)
        more = "# A new guide\n\n" + "A sentence of the new document stands here for all to read. " * 4
        (tmp_path / "docs/new.md").write_text(more)
        outcome = server.call(piped, given)
        assert outcome.code == 0 and "written" in ended(outcome.output), outcome.output
        assert all(endpoint.asked[digest] == asked[digest] for digest in before)
        assert len(replies() - before) < 20
