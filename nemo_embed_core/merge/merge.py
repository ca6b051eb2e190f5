"""The two verbs: `merge` makes a Hugging Face folder of checkpoints, runs and folders, `check` proves one."""

from __future__ import annotations

import functools
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from nemo_embed_core.checkpoint.hf_folder import find_folder
from nemo_embed_core.checkpoint.source import Usage, resolve, usage_of_folder
from nemo_embed_core.encoders import open_encoder
from nemo_embed_core.errors import UserError
from nemo_embed_core.export import serving
from nemo_embed_core.export.card import Card, describe, serving_section, shown_command
from nemo_embed_core.export.folder import check_mergeable, write_folder
from nemo_embed_core.export.formats import (
    CONSUMERS,
    FORMATS,
    LIBRARIES,
    Answer,
    Format,
    check_format,
    check_variants,
)
from nemo_embed_core.export.hub import Push
from nemo_embed_core.export.peft import PEFT, write_adapter
from nemo_embed_core.export.proof import verify_folder
from nemo_embed_core.files.durable import new_folder, writing
from nemo_embed_core.files.safetensors import dtype_name
from nemo_embed_core.merge import recipes
from nemo_embed_core.merge.output import weight_bytes
from nemo_embed_core.merge.publish import check_push, publish
from nemo_embed_core.merge.recipes import Method, Score
from nemo_embed_core.merge.report import report_lines, write_report
from nemo_embed_core.merge.sources import DTYPES, dtype_of, one_tokenizer, open_sources
from nemo_embed_core.merge.stream import write_weights
from nemo_embed_core.merge.usage import united_usage
from nemo_embed_core.model.spec import hf_shapes

BESIDE_BYTES = 1 << 20  # per source: card, licences, report
Dtype = Literal["auto", "bf16", "fp32", "fp16"]
Say = Callable[[str], None]
Metrics = dict[str, dict[str, float]]
Report = dict[str, Any]
_print = functools.partial(print, flush=True)  # a log file shows each line when it is said


def merge(
    sources: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    method: Method = "average",
    t: float | None = None,
    evaluate: Score | None = None,
    dtype: Dtype = "auto",
    format: Format | Literal["peft"] = "native",
    variants: Sequence[str] = (),
    task: str | None = None,
    document_task: str | None = None,
    push: Push | None = None,
    command: Sequence[str] = (),
    say: Say = _print,
) -> Report:
    """Write the Hugging Face folder `output` with  m = sum_i c_i w_i  of the sources' weights w_1 ... w_N.

        average, weights=None     c_i = 1 / N; one source is converted
        average, weights=[...]    c as given; they must sum to 1
        slerp, t                  c = sin((1 - t) v) / sin v, sin(t v) / sin v;  v: angle between two tensors
        soup, evaluate            c_i = 1 / |S| for i in S, chosen by evaluate's scores (greedy_soup)

    correctly rounded.

    sources: checkpoints of any layout, runs (their newest checkpoint) and Hugging Face folders, mixed.
    evaluate: a function of a folder, or a command line with {folder} that prints the score on its last line;
        higher is better.
    dtype: of the output; "auto" is the sources' own.  format: "native" for transformers >= 5.2, "compat" for
        >= 4.51, with code; "onnx", "gguf": native, and a file for onnxruntime, for llama.cpp; "peft": of one
        run of LoRA the adapters alone, for that library, unproven.
    variants: smaller files beside the format's own, of formats.VARIANTS.
    task, document_task: instructions of the default prompts; None: the sources' own.
    push: onto the Hugging Face hub, once it is proven.  command: for the model card.  say: gets every line.

    The folder is proven by check() before it appears under its name. Returns what merge-report.json has (it
    is written where there are several sources). UserError for sources that differ in shape, tokenizer,
    pooling or similarity, for values that are not finite, and for a proof that fails; nothing is left behind
    then.
    """
    recipes.check_recipe(method, weights, t, evaluate)
    for option, value, known in (("dtype", dtype, ("auto", *DTYPES)), ("format", format, (*FORMATS, PEFT))):
        if value not in known:
            raise UserError(f"{option}={value!r} must be one of {', '.join(known)}")
    check_variants(format, variants)
    if push is not None:
        if format == PEFT:
            raise UserError("format=peft is not proven, so it is not pushed: export the folded model")
        check_push(push)
    paths = [str(path) for path in ([sources] if isinstance(sources, str | Path) else sources)]
    if not paths:
        raise UserError("no sources: give checkpoints, runs or Hugging Face folders")
    output = Path(output)
    origins = [resolve(path) for path in paths]
    for origin in origins:
        check_mergeable(origin)
    opened = open_sources(paths, say)
    whole: Format = "native" if format == "peft" else format
    check_format(whole, opened[0].model)
    if format == PEFT and (len(opened) > 1 or dtype not in ("auto", "fp32")):
        raise UserError("format=peft writes the fp32 adapters of one run: give one source, and no dtype")
    if weights is not None:
        recipes.check_weights(weights, len(opened))
    torch_dtype = dtype_of(dtype, opened)
    dtype_text = dtype_name(torch_dtype)

    def encoded(members: Sequence[int]) -> tuple[Usage, list[str]]:
        """How their average encodes texts, and what is to be said of it: other sources have no say in it."""
        named = [(opened[i].name, origins[i].usage) for i in members]
        why_first = "it was given first" if evaluate is None else "it scored best alone"
        return united_usage(named, task, document_task, why_first=why_first)

    members = list(range(len(opened)))
    usage, said = encoded(members)
    tokenizer_files, servable = one_tokenizer(paths, opened)
    if evaluate is None:
        say("\n".join(usage.lines() + said + servable))
    if format == PEFT:
        with new_folder(output) as folder:
            write_adapter(folder, opened[0], tokenizer_files, usage, describe(opened))
        say(f"wrote {output} (LoRA adapters for peft)")
        return {}
    serving.check_file(whole, opened[0].model, tokenizer_files, variants)
    beside = sum(map(len, tokenizer_files.values())) + BESIDE_BYTES * len(opened)
    shapes = hf_shapes(opened[0].model)
    of_file = {"onnx": torch.float32, "gguf": torch_dtype}.get(whole)
    needed = weight_bytes(shapes, torch_dtype) + beside
    # None of them is larger than half of the file that it is made of.
    if of_file is not None:
        needed += weight_bytes(shapes, of_file) * (2 + len(variants)) // 2

    def write(folder: Path, members: Sequence[int], metrics: Metrics | None = None, **how: Any) -> Report:
        chosen, (usage, said) = [opened[i] for i in members], encoded(members)
        report = write_weights(folder, chosen, torch_dtype, beside=beside, **how)
        card: Card = {**describe(chosen, report), "title": output.name, "choices": said + servable}
        if command:
            card["command"] = shown_command(command)
        if metrics:
            card["metrics"] = metrics
        model = chosen[0].model
        write_folder(folder, model, dtype_text, tokenizer_files, format=whole, usage=usage, card=card)
        return report

    with writing(output, needed, "the merged model"), new_folder(output) as folder:
        if evaluate is None:
            report = write(folder, members, weights=weights, slerp=t)
        else:
            how_scored = recipes.score_name(evaluate)
            named = list(zip(paths, [source.name for source in opened], strict=True))
            members, decisions = _soup(named, folder / "candidate", write, evaluate, say)
            score = next(decision["score"] for decision in decisions if decision["members"] == members)
            usage, said = encoded(members)
            say("\n".join(usage.lines() + said + servable))
            shown = shown_command(shlex.split(evaluate)) if isinstance(evaluate, str) else how_scored
            report = write(folder, members, {shown: {"score": score}}, hashed=False)
            report |= {"method": "soup", "evaluate": how_scored, "decisions": decisions}
        for file in serving.write_files(whole, folder, variants):
            say(f"  {file.relative_to(folder)}: {file.stat().st_size:,} bytes")
        # A folder that fails is not published.
        asked = (*LIBRARIES, *filter(None, [FORMATS[whole].consumer]), *serving.JUDGES)
        answers = check(folder, ours=True, consumers=asked, say=say)["consumers"]
        with (folder / "README.md").open("a", encoding="utf-8") as readme:
            readme.write(serving_section(answers, usage))
        if len(opened) > 1:
            write_report(folder, report)
            say("\n".join(report_lines(report)))
    how = "converted" if len(members) == 1 else f"{report['method']} of {len(members)}"
    say(f"wrote {output} ({dtype_text}, {how})")
    if push is not None:
        publish(output, push, say)
    return report


def _soup(
    named: Sequence[tuple[str, str]], candidate: Path, write: Callable[..., Any], evaluate: Score, say: Say
) -> tuple[list[int], list[dict[str, Any]]]:
    """greedy_soup() of sources (path, name) by evaluate's scores, averages being in a folder for the time."""

    def score(members: Sequence[int]) -> float:
        paths = ", ".join(named[i][0] for i in members)
        candidate.mkdir()
        try:
            write(candidate, members, hashed=len(members) == 1)  # each source is hashed once, alone
            value = recipes.score_of(candidate, evaluate, paths)
        finally:
            shutil.rmtree(candidate)
        say(f"  {value:.6g}  {paths}")
        return value

    return recipes.greedy_soup([name for _, name in named], score)


def check(
    folder: str | Path,
    trust_remote_code: bool = False,
    *,
    ours: bool = False,
    consumers: Sequence[str] = LIBRARIES,
    push: Push | None = None,
    say: Say = _print,
) -> Report:
    """transformers.encode(x) = sentence_transformers.encode(x) = Embedder.encode(x), and the mask is as said.

    ours: a folder of this version, spelled as it writes them; else anybody's, of which all that can be
    is proven and the rest is said.  trust_remote_code: run code in the folder that we did not write.
    consumers: of export/formats.py's CONSUMERS; others than these two libraries are asked of our own folders.
    push: an export of ours onto the Hugging Face hub, where all of this holds and whoever reads a file of it
    that is installed here was asked too.
    Returns what was measured (export/proof.py) and "consumers": the Answer of each; UserError names the
    faults.
    """
    if unknown := [name for name in consumers if name not in CONSUMERS]:
        raise UserError(f"consumers: {unknown[0]!r} is none of {', '.join(CONSUMERS)}")
    path, notes = find_folder(folder)
    for note in notes:
        say(f"  note: {note}")
    if push is not None:
        check_push(push)
        files = [name for name, one in CONSUMERS.items() if one.file and (path / one.file).is_file()]
        consumers = tuple(dict.fromkeys((*LIBRARIES, *consumers, *files)))

    def embed(texts: list[str], max_length: int) -> np.ndarray:
        # Our copy of the weights is gone when it returns.
        return open_encoder(path, "cpu", "fp32", by="ours").encode(texts, max_length=max_length)

    report: Report = {"consumers": []}
    if libraries := [name for name in consumers if name in LIBRARIES]:
        is_ours = ours or push is not None
        report |= verify_folder(
            path, embed, trust_remote_code, ours=is_ours, say=lambda line: say(f"  {line}")
        )
        versions = {name: report[name.replace("-", "_")] for name in libraries}
        proven = [Answer(name, "proven", f"{name} {v}") for name, v in versions.items() if v != "not there"]
        report["consumers"] += proven
    for name in consumers:
        if name not in LIBRARIES:
            answer = serving.ask(path, name, embed)
            report["consumers"].append(answer)
            say(f"  {name}: {answer.state}, {answer.words}")
    if not ours:
        say("\n".join(f"  {line}" for line in usage_of_folder(path).lines()))
        if bad := [answer for answer in report["consumers"] if answer.state in ("refused", "wrong")]:
            raise UserError("; ".join(f"{path} is not for {a.consumer}: {a.words}" for a in bad))
    if push is not None:
        publish(path, push, say)
    return report
