"""What a pipeline has found, out of the files of its stages: the facts of its page.

    found = report(config, setting, stages, output)       # what report.json has

Figures are copied from the stages' own JSON files, none is computed here but counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from nemo_embed_core.checkpoint.runs import checkpoints
from nemo_embed_core.config import DatasetConfig, PipelineConfig
from nemo_embed_core.data.dataset import METADATA, read_documents
from nemo_embed_core.data.readers import Findings, read_rows
from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation.alarms import strict_threshold
from nemo_embed_core.evaluation.beside import trained_with
from nemo_embed_core.evaluation.overlap import words
from nemo_embed_core.files.strict_json import parse, read_object
from nemo_embed_core.pipeline.stages import TASK, Setting, Stages
from nemo_embed_core.steps.runner import LOG, shown
from nemo_embed_core.steps.state import DONE, place, real
from nemo_embed_core.steps.step import Step

SAMPLES, EXAMPLES = 6, 3  # rows that were trained on; held-out queries that gained, and that lost
POINTS = 400  # of a curve
SURE = 0.01  # p below which the tuned model is said to be better than its base
TRIVIAL = 0.5  # share of mined negatives that are as easy as half of all texts, from which on they are one
LEAK = 0.05  # share of the held-out queries in training data from which on it is an alarm
NOT_SERVED = re.compile(r"[\w.-]+: (wrong|refused), ")  # of what merge --check says
CURVES = ("loss", "accuracy", "grad_norm", "lr")


def report(config: PipelineConfig, setting: Setting, stages: Stages, output: Path) -> dict[str, Any]:

    def product(name: str) -> Path:
        return Path(real(stages.steps[name].product, output))

    base, tuned, *_ = models = read_object(product("compared"))["models"]
    label = {base: "base", tuned: "tuned", "bm25": "BM25"}
    scores, compared = read_object(product("scores")), read_object(product("compared"))
    pairs = {name: product("pairs") / name for name in ("train", "test")}
    task = compared["tasks"][TASK]
    metric = task["main_score"]
    differences = {
        (label[entry["b"]], label[entry["a"]]): entry["tasks"][TASK]
        for entry in compared["pairs"]
        if entry["tasks"]
    }
    mined = product("mine")
    mining = mined.with_name(f"{mined.name}.report.json")
    reports = {"pairs": read_object(mining)} if mining.is_file() else {
        path.name: read_object(path.with_name(f"{path.name}.report.json"))
        for path in sorted(mined.iterdir()) if path.is_dir() and not path.name.endswith(".work")
    }  # fmt: skip
    trained = [mined] if mining.is_file() else [mined / name for name in reports]
    checked = {name: step for name, step in stages.steps.items() if step.verb.name == "check"}
    overlap = scores[tuned].get("overlap")
    found: dict[str, Any] = {
        "documents": config.documents,
        "base": config.base,
        "method": setting.chosen.method,
        "layers": setting.chosen.layers,
        "task": config.task,
        "held_out": config.self_pairs.held_out,
        "metric": metric,
        "queries": task["queries"],
        "scores": {label[model]: task["scores"][model] for model in models},
        "metrics": {label[model]: _metrics(scores[model]) for model in models},
        "differences": [
            {"of": of, "minus": minus, **entry} for (of, minus), entry in differences.items()
        ],
        "notes": [_named(note, label) for note in compared["settings"]["notes"] if " differ: " in note],
        "splits": splits(pairs),
        "written": _written(stages, output),
        "mining": {name: _mining(entry) for name, entry in reports.items()},
        "overlap": words(overlap) if overlap else "",
        "curve": _curve(product("tuned") / "metrics.jsonl"),
        "samples": list(_samples(trained)),
        "examples": _examples(compared, base, tuned, label),
        "checks": {name: list(_said(step, output)) for name, step in checked.items()},
        "model": str(output / "model"),
        "serving": _serving(product("export") / "README.md"),
        "stages": [_stage(name, step, setting, output) for name, step in stages.steps.items()],
    }  # fmt: skip
    found["is_better"] = _is_better(differences["tuned", "base"])
    found["alarms"] = list(_alarms(found, scores, label, reports, product("tuned")))
    return found


def _named(note: str, label: Mapping[str, str]) -> str:
    for model, name in label.items():
        note = note.replace(model, name)
    return note


def _is_better(difference: Mapping[str, Any]) -> bool:
    return difference["score"] > 0 and difference["p_holm"] is not None and difference["p_holm"] < SURE


def splits(folders: Mapping[str, Path]) -> dict[str, dict[str, int]]:
    """What is counted of each split. UserError for a document that is in both, whatever put it there."""
    files = {name: _files(folder) for name, folder in folders.items()}
    if both := sorted(files["train"] & files["test"]):
        raise UserError(f"{len(both)} documents are in train and in test, first {both[0]}: nothing is proven")
    counts = {name: read_object(folder / METADATA)["counts"] for name, folder in folders.items()}
    return {name: {**counts[name], "files": len(files[name])} for name in folders}


def _files(folder: Path) -> set[str]:
    """Documents that the chunks of a split are of."""
    return {key.rpartition("#")[0] for key, *_ in read_documents(folder, Findings(strict=True))}


def _metrics(entry: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if re.fullmatch(r"[a-z]+_at_\d+", name)}


def _mining(entry: Mapping[str, Any]) -> dict[str, Any]:
    names = ("queries", "documents", "threshold", "num_negatives", "negatives", "with_no_negatives",
             "trivial_negatives", "histogram")  # fmt: skip
    return {name: entry[name] for name in names}


def _written(stages: Stages, output: Path) -> dict[str, Any]:
    if "written" not in stages.steps:
        return {}
    folder = Path(real(stages.steps["written"].product, output)) / "datasets"
    found = read_object(folder / "report.json")
    return {name: found[name] for name in ("requests", "replies", "spent", "tokens", "written")}


def _curve(file: Path) -> dict[str, list[float]]:
    """Of every step, or of POINTS of them."""
    steps = [values for line in file.read_bytes().splitlines() if "loss" in (values := parse(line))]
    every = -(-len(steps) // POINTS)
    kept = [values for i, values in enumerate(steps) if i % every == 0 or i == len(steps) - 1]
    return {name: [values[name] for values in kept] for name in ("step", *CURVES) if name in steps[0]}


def _samples(folders: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Evenly out of each dataset, as training read it."""
    for folder in folders:
        config = DatasetConfig(path=str(folder))
        count = read_object(folder / METADATA)["counts"]["queries"]
        for row in islice(read_rows(config), 0, None, max(1, count // (SAMPLES // len(folders) or 1))):
            yield {"query": row.query, "documents": row.pos, "negatives": row.neg, "of": row.pos_ids[0]}


def _examples(
    compared: Mapping[str, Any], base: str, tuned: str, label: Mapping[str, str]
) -> dict[str, list[dict[str, Any]]]:
    entry = next((e for e in compared["differ_most"] if (e["a"], e["b"]) == (base, tuned)), None)

    def shown_query(query: Mapping[str, Any]) -> dict[str, Any]:
        best = {label[m]: side["found"][:1] for m, side in query["models"].items()}
        texts = query["texts"]
        return {
            "query": query["text"],
            "scores": {label[model]: side["score"] for model, side in query["models"].items()},
            "first": {who: texts.get(ids[0], ids[0]) if ids else "" for who, ids in best.items()},
        }

    if entry is None:
        return {"gains": [], "losses": []}
    return {what: list(map(shown_query, entry[what][:EXAMPLES])) for what in ("gains", "losses")}


def _said(step: Step, output: Path) -> Iterator[str]:
    """What the last attempt printed."""
    lines = (place(step, output) / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    last = max(i for i, line in enumerate(lines) if line.startswith("$ "))
    yield from (line.strip() for line in lines[last + 1 :] if line.strip())


def _serving(readme: Path) -> str:
    return readme.read_text(encoding="utf-8").partition("\n## Serving\n")[2].strip()


def _stage(name: str, step: Step, setting: Setting, output: Path) -> dict[str, Any]:
    done = read_object(place(step, output) / DONE)
    command = shown(step, output, setting.machine.ranks)
    return {"name": name, "seconds": done["seconds"], "code": done["code"], "command": command,
            "folder": str(place(step, output).relative_to(output))}  # fmt: skip


def _alarms(
    found: Mapping[str, Any],
    scores: Mapping[str, Any],
    label: Mapping[str, str],
    reports: Mapping[str, Any],
    run: Path,
) -> Iterator[dict[str, str]]:
    if not found["is_better"]:
        says = f"the tuned model is not shown to be better than its base, by p < {SURE:g}"
        yield {"of": "scores", "says": says}
    tuned = next(model for model, name in label.items() if name == "tuned")
    for own in scores[tuned].get("alarms", ()):  # those of the base are no fault of what was made of it
        yield {"of": "tuned", "says": f"{own['kind']}: {own['says']}"}
    sounded = [("training", alarm) for alarm in trained_with(checkpoints(run)[0])]
    sounded += [(f"mining of {name}", strict_threshold(entry)) for name, entry in reports.items()]
    for of, alarm in sounded:
        if alarm is not None:
            yield {"of": of, "says": f"{alarm.kind}: {alarm.says}"}
    for name, entry in reports.items():
        if (share := entry["trivial_negatives"] / max(1, entry["negatives"])) > TRIVIAL:
            says = f"{share:.0%} of the negatives score no higher than two texts at random: the base cannot "
            says += "tell hard from easy; raise threshold, or run again, into another output, with this "
            yield {"of": f"mining of {name}", "says": f"{says}run's model as the base"}
    overlap = next((s["overlap"] for s in scores.values() if s.get("overlap")), None)
    if overlap and (share := overlap["queries"]["share"]) > LEAK:
        says = (
            f"{share:.1%} of the held-out queries stand in the training data too, as copies, near copies or "
        )
        yield {"of": "scores", "says": f"{says}parts: the scores say less of new questions"}
    for name, said in found["checks"].items():
        yield from ({"of": name, "says": line} for line in said if NOT_SERVED.match(line))
