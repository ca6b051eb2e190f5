"""merge(save(load(x))) is x, bit for bit; averages are correctly rounded; nothing half-written is left."""

import dataclasses
import errno
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import Server
from safetensors.torch import load_file, save_file
from tiny import MODEL, train_config, write_hf, write_rows

from nemo_embed_core.checkpoint.manifest import CheckpointError, check_coverage
from nemo_embed_core.checkpoint.source import Prompts, Usage, resolve
from nemo_embed_core.checkpoint.weights import open_weights
from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.durable import new_folder
from nemo_embed_core.files.page_cache import is_cached
from nemo_embed_core.merge import average, merge, stream
from nemo_embed_core.merge.recipes import greedy_soup, slerp_weights
from nemo_embed_core.merge.report import report_lines
from nemo_embed_core.merge.sources import dtype_of, open_sources
from nemo_embed_core.merge.stream import write_weights
from nemo_embed_core.merge.usage import united_usage
from nemo_embed_core.model import spec

ROOT = Path(__file__).resolve().parents[2]


def save_on_mesh(folder: str, sources: list[str]) -> None:
    """Load each source under tp = 1, 2, 4 (the rest of the ranks are dp) and save it untrained (steps = 0);
    then that again under tp = 2, 4, 1."""
    from nemo_embed_core.checkpoint.weights import read_model_config
    from nemo_embed_core.data.tokenizer import load_tokenizer
    from nemo_embed_core.parallel.mesh import build_mesh
    from nemo_embed_core.train.preflight import Prepared
    from nemo_embed_core.train.trainer import Trainer

    dist.init_process_group("gloo")
    for source in sources:
        for tp in (1, 2, 4):
            output = f"{folder}/saved-{Path(source).name}-{tp}"
            for init_from, output_dir, size in (
                (source, output, tp),
                (output, output + "-again", tp % 4 * 2 or 1),
            ):
                config = train_config(Path(folder), init_from=init_from, steps=0, output_dir=output_dir)
                mesh = build_mesh(torch.device("cpu"), dist.get_world_size() // size, size, True)
                prepared = Prepared(read_model_config(source), load_tokenizer(config.tokenizer))
                Trainer(config, mesh, prepared, lambda message: None).run()


@pytest.mark.dist
def test_load_save_merge_is_bitwise_the_identity(tmp_path: Path, server: Server) -> None:
    train_config(tmp_path)
    folders = [
        (write_hf(tmp_path / str(d).removeprefix("torch."), d), d) for d in (torch.bfloat16, torch.float32)
    ]
    # Neither the vocabulary nor the MLP's blocks are divisible: the last ranks hold padding, which no file
    # has.
    odd = dataclasses.replace(MODEL, vocab_size=509, intermediate_size=99)
    folders.append((write_hf(tmp_path / "odd", torch.float32, config=odd), torch.float32))
    server.results(save_on_mesh, 4, str(tmp_path), [str(folder) for folder, _ in folders])
    for folder, dtype in folders:
        want = load_file(folder / "model.safetensors")
        for tp, name in [(tp, f"{tp}") for tp in (1, 2, 4)] + [
            (tp % 4 * 2 or 1, f"{tp}-again") for tp in (1, 2, 4)
        ]:
            saved = open_weights(str(tmp_path / f"saved-{folder.name}-{name}"))
            layout = saved.reader.manifest["layout"]
            assert layout == {"tp_size": tp, "dp_size": 4 // tp, "dp_replicate": 1} and saved.dtype == dtype
            out = tmp_path / f"merged-{folder.name}-{name}"
            out.mkdir()
            write_weights(out, [saved], dtype_of("auto", [saved]))
            got = load_file(out / "model.safetensors")
            assert got.keys() == want.keys()
            for name in want:
                assert got[name].dtype == dtype and torch.equal(got[name], want[name]), (
                    f"{dtype} tp={tp}: {name}"
                )


def test_sharded_output_is_read_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_weights(str(write_hf(tmp_path / "hf", torch.float32)))
    monkeypatch.setattr("nemo_embed_core.merge.output.SHARD_BYTES", 60_000)
    monkeypatch.setattr(stream, "BLOCK_ELEMENTS", 1000)
    out = write_hf(tmp_path / "out", torch.float32, seed=9)
    (out / "model.safetensors").unlink()
    write_weights(out, [source], torch.float32)
    assert len(list(out.glob("model-*.safetensors"))) > 3
    again = open_weights(str(out))
    for name, shape in spec.parameter_shapes(MODEL).items():
        box = ((0,) * len(shape), shape)
        assert torch.equal(again.reader.read_box(name, box), source.reader.read_box(name, box))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_average_of_three_is_correctly_rounded(tmp_path: Path, dtype: torch.dtype) -> None:
    paths = [str(write_hf(tmp_path / f"m{i}", torch.bfloat16, seed=i)) for i in range(3)]
    sources = open_sources(paths)
    write_weights(tmp_path, sources, dtype)
    got = load_file(tmp_path / "model.safetensors")
    inputs = [load_file(Path(p) / "model.safetensors") for p in paths]
    wrong = 0
    for name in got:
        exact = sum(w[name].double() for w in inputs) / 3
        wrong += int((got[name] != nearest(exact, dtype)).sum())
    assert wrong == 0


def nearest(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The closest value of dtype, ties to even, by trying the neighbours in fp64."""
    rough = x.to(dtype)
    if dtype == torch.float32:
        return rough
    integer = rough.view(torch.int16)
    candidates = torch.stack([rough, (integer + 1).view(dtype), (integer - 1).view(dtype)])
    distance = (candidates.double() - x).abs()
    tied = distance == distance.amin(0)
    odd = (candidates.view(torch.int16) & 1).bool()
    best = (tied.int() * 2 - (tied & odd).int()).argmax(0)  # nearest, and of two equally near the even one
    return candidates.gather(0, best[None])[0]


def test_rounding_once_beats_rounding_twice() -> None:
    """1 + 2^-8 + 2^-40 lies above the tie between two bf16 values; through fp32 it lands on the tie and
    rounds down."""
    x = torch.tensor(
        [1 + 2**-8 + 2**-40, -(1 + 2**-8 + 2**-40), 1 + 2**-8, 1e-46, -1e-46, 0.0], dtype=torch.float64
    )
    assert x[:1].to(torch.bfloat16).item() == 1.0, "torch's own cast rounds twice"
    want = [1 + 2**-7, -(1 + 2**-7), 1.0, 0.0, -0.0, 0.0]
    assert average.round_once(x, torch.bfloat16).tolist() == want


def test_a_merge_leaves_the_page_cache_as_it_was(tmp_path: Path) -> None:
    # More than is read ahead.
    config = dataclasses.replace(MODEL, vocab_size=(24 << 20) // 4 // MODEL.hidden_size)
    paths = [write_hf(tmp_path / str(i), torch.float32, seed=i, config=config) for i in range(4)]
    kept, unknown, *others = [path / "model.safetensors" for path in paths]

    def cached(file: Path) -> bool:  # asking brings the end of the file into the cache: once each
        with file.open("rb") as handle:
            return is_cached(handle.fileno())

    for file in (unknown, *others):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    kept.read_bytes()
    if not cached(kept) or cached(unknown):
        pytest.skip("this file system does not say what is cached, or keeps all")
    (tmp_path / "out").mkdir()
    sources = open_sources([str(path.parent) for path in (kept, *others)])
    write_weights(tmp_path / "out", sources, torch.float32)
    assert [cached(file) for file in (kept, *others)] == [True, False, False]


@pytest.mark.fault(22)
def test_sources_of_other_shapes_and_non_finite_weights_are_refused(tmp_path: Path) -> None:
    a = write_hf(tmp_path / "a", torch.float32)
    b = write_hf(tmp_path / "b", torch.float32, config=dataclasses.replace(MODEL, num_hidden_layers=1))
    with pytest.raises(UserError, match="num_hidden_layers: 2 and 1"):
        open_sources([str(a), str(b)])
    weights = load_file(a / "model.safetensors")
    weights["layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, a / "model.safetensors")
    with pytest.raises(UserError, match=r"layers.1.mlp.up_proj.weight has NaN or infinite values in .*a"):
        write_weights(tmp_path, open_sources([str(a)]), torch.float32)


def test_a_missing_or_doubled_piece_is_found(tmp_path: Path) -> None:
    pieces = [
        {"file": "a", "offset": [0, 0], "size": [2, 4]},
        {"file": "b", "offset": [2, 0], "size": [2, 4]},
    ]
    check_coverage(tmp_path, "w", [4, 4], pieces)
    with pytest.raises(CheckpointError, match="w has 8 of 16 elements"):
        check_coverage(tmp_path, "w", [4, 4], pieces[:1])
    with pytest.raises(CheckpointError, match="stored twice, in c and a"):
        check_coverage(tmp_path, "w", [4, 4], [*pieces, {"file": "c", "offset": [1, 0], "size": [1, 4]}])
    with pytest.raises(CheckpointError, match="outside its shape"):
        check_coverage(tmp_path, "w", [3, 4], pieces)


# --------------------------------------------------------------------------------------- weights, slerp, soup


def launcher(monkeypatch: pytest.MonkeyPatch, *argv: object) -> None:
    """launch/merge.py with these arguments, without loading what it wrote into other libraries."""
    spec = importlib.util.spec_from_file_location("merge_launcher", ROOT / "launch/merge.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(merge, "check", lambda folder, **options: {"consumers": []})
    monkeypatch.setattr(sys, "argv", ["merge.py", *map(str, argv)])
    module.main()


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("three")
    return [write_hf(folder / f"m{i}", torch.float32, seed=i) for i in range(3)]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_weights_are_applied_in_the_order_of_the_sources(
    three: list[Path], tmp_path: Path, monkeypatch
) -> None:
    launcher(monkeypatch, *three, "--weights", 0.5, 0.3, 0.2, "-o", tmp_path / "out")
    a, b, c = map(weights_of, three)
    for name, got in weights_of(tmp_path / "out").items():
        rounded = a[name].double() * 0.5 + b[name].double() * 0.3 + c[name].double() * 0.2
        # Where fp64 takes the other one of two neighbours (these weights are multiples of 2^-24), ours must
        # be the right one.
        differ = (got != rounded.float()).nonzero().tolist()
        assert len(differ) < 0.3 * got.numel(), name
        for place in map(tuple, differ[:50]):
            values = [x[name][place].item() for x in (a, b, c)]
            assert got[place] == average.nearest(average.exact_sum(values, [0.5, 0.3, 0.2]), torch.float32)
    report = json.loads((tmp_path / "out/merge-report.json").read_text())
    assert report["method"] == "weighted" and report["weights"] == [0.5, 0.3, 0.2]


@pytest.mark.fault(22)
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.3, 0.3], r"sum to 1\.1"),
        ([0.5, 0.3, 0.200002], r"sum to 1\.000002"),
        ([float("nan"), 0.5, 0.5], "sum to nan"),
        ([0.5, 0.5], "2 weights for 3 sources"),
    ],
)
def test_weights_that_do_not_sum_to_one_are_refused(
    weights, message, three, tmp_path, monkeypatch, capsys
) -> None:
    with pytest.raises(SystemExit) as end:
        launcher(monkeypatch, *three, "--weights", *weights, "-o", tmp_path / "out")
    assert end.value.code == 2 and re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_slerp_follows_its_formula(three: list[Path], tmp_path: Path) -> None:
    # Two tensors in directions of their own, one that is parallel and one that is zero.
    first, second = (weights_of(path) for path in three[:2])
    second["norm.weight"] = first["norm.weight"] * 3
    second["layers.0.input_layernorm.weight"] = torch.zeros(64)
    folders = [write_hf(tmp_path / name, torch.float32) for name in "ab"]
    for folder, weights in zip(folders, (first, second), strict=True):
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    sources = open_sources([str(folder) for folder in folders])
    out = tmp_path / "out"
    out.mkdir()
    report = write_weights(out, sources, torch.float32, slerp=0.3)
    linear = ["layers.0.input_layernorm.weight", "norm.weight"]
    assert sorted(report["interpolated_linearly"]) == linear and report["t"] == 0.3
    for name, got in weights_of(out).items():
        a, b = first[name].double(), second[name].double()
        if name in linear:
            want = 0.7 * a + 0.3 * b
        else:
            angle = torch.acos((a * b).sum() / a.norm() / b.norm())
            want = (torch.sin(0.7 * angle) * a + torch.sin(0.3 * angle) * b) / torch.sin(angle)
            # On the arc: 0.3 of the angle away from the first source, for sources of about the same norm.
            assert torch.acos((want * a).sum() / want.norm() / a.norm()).item() == pytest.approx(
                0.3 * float(angle), rel=0.05
            )
        assert (got.double() - want).abs().max() <= want.abs().max() * 2**-23, name


def test_slerp_ends_are_the_sources_and_need_two(three: list[Path], tmp_path: Path) -> None:
    sources = open_sources([str(path) for path in three])
    for t in (0.0, 1.0):
        out = tmp_path / str(t)
        out.mkdir()
        write_weights(out, sources[:2], torch.float32, slerp=t)
        want = weights_of(three[int(t)])
        assert all(torch.equal(got, want[name]) for name, got in weights_of(out).items())
    with pytest.raises(UserError, match="3 were given"):
        write_weights(tmp_path, sources, torch.float32, slerp=0.5)
    with pytest.raises(UserError, match=r"t=1\.5 of slerp"):
        write_weights(tmp_path, sources[:2], torch.float32, slerp=1.5)
    assert slerp_weights(1.0, 1.0, -1.0, 0.5) == ((0.5, 0.5), True)  # opposite: no way round is shorter


def test_a_greedy_soup_keeps_what_does_not_lower_the_score() -> None:
    scores = {(0,): 1.0, (1,): 3.0, (2,): 2.0, (3,): 2.0, (1, 2): 3.0, (1, 2, 3): 2.9, (1, 2, 0): 3.5}
    kept, decisions = greedy_soup("abcd", lambda members: scores[tuple(members)])
    assert kept == [1, 2, 0]
    assert all(scores[tuple(d["members"])] == d["score"] for d in decisions), (
        "also where two sources have one name"
    )
    tried = [("".join(d["sources"]), d.get("kept")) for d in decisions]
    assert tried == [
        ("a", None),
        ("b", None),
        ("c", None),
        ("d", None),
        ("bc", True),
        ("bcd", False),
        ("bca", True),
    ]


SCORE = """
import json, sys, pathlib
from safetensors import safe_open
folder = pathlib.Path(sys.argv[1])
assert (folder / "tokenizer.json").is_file()
assert json.loads((folder / "config.json").read_text())["is_causal"] is False
value = safe_open(folder / "model.safetensors", "np").get_tensor("norm.weight")[0].item()
print("loading ...")
print(-abs(value - 1.6))
"""


def test_soup_through_the_launcher(three: list[Path], tmp_path: Path, monkeypatch, capsys) -> None:
    """Scored by the distance of one weight to 1.6: own values 1, 2 and 9, so 2 stays, the mean with 1 is
    better, 9 is not."""
    folders = []
    for i, value in enumerate((1.0, 2.0, 9.0)):
        folders.append(say_usage(write_hf(tmp_path / f"s{i}", torch.float32, seed=i), f"s{i}: "))
        weights = weights_of(three[i])
        weights["norm.weight"][0] = value
        save_file(weights, folders[-1] / "model.safetensors", {"format": "pt"})
    (tmp_path / "score.py").write_text(SCORE)
    evaluate = f"{sys.executable} {tmp_path / 'score.py'} {{folder}}"
    launcher(monkeypatch, *folders, "--method", "soup", "--evaluate", evaluate, "-o", tmp_path / "out")
    report = json.loads((tmp_path / "out/merge-report.json").read_text())
    assert [d.get("kept") for d in report["decisions"]] == [None, None, None, True, False]
    assert [s["name"] for s in report["sources"]] == ["s1", "s0"] and report["method"] == "soup"
    assert weights_of(tmp_path / "out")["norm.weight"][0] == 1.5
    assert not (tmp_path / "out/candidate").exists()
    # The prompts are its members': s2's are neither written nor said.
    settings = json.loads((tmp_path / "out/config_sentence_transformers.json").read_text())
    assert settings["prompts"] == {"query": "s1: ", "document": "", "s1": "s1: ", "s0": "s0: "}
    said = capsys.readouterr().out
    assert (
        "s1's is the default of the merged model, because it scored best alone" in said and "s2: " not in said
    )
    card = (tmp_path / "out/README.md").read_text()
    assert "because it scored best alone" in card and "s2: " not in card
    for broken in ("print('no number')", "raise SystemExit(3)", "print(float('nan'))", "print('-inf')"):
        (tmp_path / "score.py").write_text(broken)
        with pytest.raises(SystemExit):
            launcher(
                monkeypatch, *folders, "--method", "soup", "--evaluate", evaluate, "-o", tmp_path / "out2"
            )
        assert re.search("not a finite number|ended with code 3", capsys.readouterr().err)
    assert not list(tmp_path.glob("*out2*"))


def test_merging_from_python(three: list[Path], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(merge, "check", lambda folder, **options: {"consumers": []})

    def closeness(folder: Path) -> float:
        """To the second source, which therefore stays alone."""
        return -float((weights_of(folder)["norm.weight"] - weights_of(three[1])["norm.weight"]).norm())

    said: list[str] = []
    report = merge.merge(
        three, tmp_path / "soup", method="soup", evaluate=closeness, dtype="bf16", say=said.append
    )
    assert report == json.loads((tmp_path / "soup/merge-report.json").read_text())
    assert report["evaluate"] == "closeness" and [s["name"] for s in report["sources"]] == ["m1"]
    want = weights_of(three[1])
    assert all(torch.equal(got, want[name].bfloat16()) for name, got in weights_of(tmp_path / "soup").items())
    assert said[-1] == f"wrote {tmp_path / 'soup'} (bfloat16, converted)" and not capsys.readouterr().out
    card = (tmp_path / "soup/README.md").read_text()
    assert f"| closeness | score | {report['decisions'][1]['score']} |" in card and "exported by" not in card
    report = merge.merge(str(three[0]), str(tmp_path / "one"))
    assert report["num_parameters"] == sum(x.numel() for x in want.values())
    assert "wrote " in capsys.readouterr().out
    with pytest.raises(UserError, match=r"evaluate=<lambda> returned nan for the average of .*m0"):
        merge.merge(three, tmp_path / "out", method="soup", evaluate=lambda folder: math.nan)
    with pytest.raises(UserError, match=r"evaluate=<lambda> returned inf for the average of .*m0"):
        merge.merge(three, tmp_path / "out", method="soup", evaluate=lambda folder: math.inf)
    for options, message in (
        ({"method": "mean"}, "method='mean' must be one of average, slerp, soup"),
        ({"method": "slerp"}, "--method slerp and --t T belong together"),
        ({"weights": [], "method": "slerp", "t": 0.5}, "--weights are of an average"),
        ({"dtype": "float32"}, "dtype='float32' must be one of auto, bf16, fp32, fp16"),
        ({"method": "soup", "evaluate": "score '{folder}"}, "is no command line: No closing quotation"),
        ({"format": "mlx"}, "format='mlx' must be one of native, compat, onnx, gguf"),
    ):
        with pytest.raises(UserError, match=message):
            merge.merge(three[:2], tmp_path / "out", **options)
    with pytest.raises(UserError, match="no sources"):
        merge.merge([], tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


# ------------------------------------------------------------------------------------------ checks and report


def test_the_report_says_how_far_each_source_is(three: list[Path], tmp_path: Path) -> None:
    sources = open_sources([str(path) for path in three])
    report = write_weights(tmp_path, sources, torch.float32)
    inputs, merged = [weights_of(path) for path in three], weights_of(tmp_path)
    for name, m in merged.items():
        tensors = [w[name].double().flatten() for w in inputs]
        m = m.double().flatten()
        for got, a in zip(report["tensors"][name]["to_merged"], tensors, strict=True):
            assert got["distance"] == pytest.approx(float((a - m).norm() / a.norm()), rel=1e-5)
            assert got["cosine"] == pytest.approx(float(a @ m / a.norm() / m.norm()), abs=1e-6)
        for got in report["tensors"][name]["between"]:
            a, b = (tensors[i] for i in got["sources"])
            assert got["distance"] == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-5)
    a, m = (torch.cat([w[name].flatten() for name in merged]).double() for w in (inputs[1], merged))
    assert report["whole"]["to_merged"][1]["distance"] == pytest.approx(
        float((a - m).norm() / a.norm()), rel=1e-5
    )
    worst = report["sources"][0]["farthest"][0]
    distances = [t["to_merged"][0]["distance"] for t in report["tensors"].values()]
    assert report["tensors"][worst]["to_merged"][0]["distance"] == max(distances)
    assert report["num_parameters"] == sum(x.numel() for x in merged.values()) and not report["equal_sources"]
    assert worst in "\n".join(report_lines(report))
    json.dumps(report, allow_nan=False)


def test_sources_that_count_twice_are_named(three: list[Path], tmp_path: Path) -> None:
    warnings: list[str] = []
    open_sources([str(three[0]), str(three[1]), str(three[0])], warnings.append)
    assert len(warnings) == 1 and "m0" in warnings[0] and "count twice" in warnings[0]
    copied = shutil.copytree(three[0], tmp_path / "copied")
    sources = open_sources([str(three[0]), str(three[1]), str(copied)], warnings.append)
    out = tmp_path / "out"
    out.mkdir()
    report = write_weights(out, sources, torch.float32)
    assert len(warnings) == 1 and report["equal_sources"] == [[0, 2]]
    assert report_lines(report)[-1] == "WARNING: m0 and copied hold the same weights: they count twice"


@pytest.mark.fault(22)
def test_other_settings_dtypes_and_tokenizers(three: list[Path], tmp_path: Path, monkeypatch, capsys) -> None:
    def refused(*argv: object) -> str:
        with pytest.raises(SystemExit) as end:
            launcher(monkeypatch, *argv, "-o", tmp_path / "out")
        assert end.value.code == 2 and not list(tmp_path.glob("*out*"))
        return capsys.readouterr().err

    changed = dataclasses.replace(MODEL, rope_theta=1e6, rms_norm_eps=1e-6)
    other = write_hf(tmp_path / "other", torch.float32, config=changed)
    text = refused(three[0], other)
    assert "rope_theta: 500000.0 and 1000000.0" in text and "rms_norm_eps" in text
    half = write_hf(tmp_path / "half", torch.bfloat16)
    text = refused(three[0], half)
    assert "m0: float32" in text and "half: bfloat16" in text and "--dtype" in text
    launcher(monkeypatch, three[0], half, "--dtype", "bf16", "-o", tmp_path / "mixed")
    a, b = weights_of(three[0]), weights_of(half)
    for name, got in weights_of(tmp_path / "mixed").items():
        exact = (a[name].double() + b[name].double()) / 2
        assert torch.equal(got, average.round_once(exact, torch.bfloat16)), name
    tokenizer = json.loads((half / "tokenizer.json").read_text())
    (half / "tokenizer.json").write_text(json.dumps(tokenizer, indent=7, sort_keys=True))
    launcher(monkeypatch, three[0], half, "--dtype", "bf16", "-o", tmp_path / "other-bytes")
    tokenizer["model"]["merges"][3:5] = tokenizer["model"]["merges"][4:2:-1]
    (half / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = refused(three[0], half, "--dtype", "bf16")
    assert "m0 and " in text and "half differ: merges (" in text and "from rank 3 on" in text
    causal = shutil.copytree(three[0], tmp_path / "causal")
    config = json.loads((causal / "config.json").read_text())
    (causal / "config.json").write_text(
        json.dumps({**config, "is_causal": True, "use_bidirectional_attention": False})
    )
    with pytest.raises(UserError, match="models of different shapes: is_causal: False and True"):
        open_sources([str(three[1]), str(causal)])


def say_usage(folder: Path, prompt: str, **settings: Any) -> Path:
    """A folder of somebody else's, with one prompt."""
    settings = {"prompts": {"query": prompt}, **settings}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 77}))
    return folder


def test_the_prompts_of_folders_are_kept_united_and_chosen(
    three: list[Path], tmp_path: Path, monkeypatch, capsys
) -> None:
    a, b = (say_usage(shutil.copytree(path, tmp_path / path.name), f"{path.name}: ") for path in three[:2])

    def merged(*argv: object, name: str) -> tuple[dict[str, str], str]:
        launcher(monkeypatch, *argv, "-o", tmp_path / name)
        settings = json.loads((tmp_path / name / "config_sentence_transformers.json").read_text())
        return settings["prompts"], capsys.readouterr().out

    prompts, text = merged(a, name="same")
    assert prompts == {"query": "m0: ", "document": ""} and "WARNING" not in text
    assert json.loads((tmp_path / "same/sentence_bert_config.json").read_text())["max_seq_length"] == 77
    assert (
        "m0 before" not in text
        and '"m0: "; before documents: none' in text
        and "longest query: 77 tokens" in text
    )
    prompts, text = merged(a, b, name="both")
    assert prompts == {"query": "m0: ", "document": "", "m0": "m0: ", "m1": "m1: "}
    assert "WARNING: the sources have 2 default prompts; m0's is the default" in text
    assert "the sources have 2 default prompts" in (tmp_path / "both/README.md").read_text()
    prompts, text = merged(a, b, "--task", "x", "--document-task", "y", name="chosen")
    new = {"query": "Instruct: x\nQuery: ", "document": "Instruct: y\nQuery: "}
    own = {"m0": "m0: ", "m0-document": "", "m1": "m1: ", "m1-document": ""}  # not the default's
    assert prompts == {**new, "default": new["query"], "default-document": new["document"], **own}
    assert "WARNING" not in text and "as --task 'x' and --document-task 'y' say" in text
    prompts, _ = merged(tmp_path / "chosen", "--task", "", name="none")
    assert prompts["query"] == "" and prompts["document"] == new["document"]


def usage(query_max_length: int | None = 64, **prompts: tuple[str, str]) -> Usage:
    named = {name: Prompts(*both) for name, both in prompts.items()}
    return Usage(prompts=named, query_max_length=query_max_length, document_max_length=128)


def test_usages_are_united_under_their_names() -> None:
    a = usage(nq=("q: ", "d: "), sts=("s: ", ""))
    assert united_usage([("a", a)])[0] == a
    assert united_usage([("a", a), ("b", a)])[0] == a
    # The same name with another prompt, the same prompt under another name, another default, another length.
    b = usage(32, sts=("t: ", ""), other=("q: ", "d: "))
    both, said = united_usage([("a", a), ("b", b)])
    assert list(both.prompts.items()) == [
        ("nq", ("q: ", "d: ")),
        ("sts", ("s: ", "")),
        ("sts-2", ("t: ", "")),
    ]
    assert both.query_max_length == 64
    assert any("WARNING: the sources have 2 default prompts; a's" in line for line in said)
    assert any("query_max_length: the sources have [32, 64]" in line for line in said)
    # A trained task that is chosen brings its own document prompt; both sides may be chosen apart.
    c = usage(nq=("n: ", ""), qa=("Instruct: find\nQuery: ", "d: "))
    chosen, said = united_usage([("c", c)], task="find")
    assert chosen.default == ("Instruct: find\nQuery: ", "d: ") and list(chosen.prompts) == ["qa", "nq"]
    assert said == ["default prompts: as --task 'find' says"]
    chosen, _ = united_usage([("c", c)], document_task="x")
    assert chosen.default == ("n: ", "Instruct: x\nQuery: ")
    # No name may overwrite another's key among sentence-transformers' prompts.
    named = united_usage([("a", usage(x=("1", "2"))), ("b", usage(**{"x-document": ("3", "4")}))])[
        0
    ].named_prompts()
    assert sorted(named.values()) == ["1", "1", "2", "2", "3", "4"]
    unknown, said = united_usage([("a", Usage())])
    assert (unknown.query_max_length, unknown.document_max_length) == (512, 512) and len(said) == 2
    for other, field in ((Usage(similarity="dot"), "similarity"), (Usage(pooling="cls"), "pooling")):
        with pytest.raises(UserError, match=f"differ in {field} "):
            united_usage([("a", a), ("b", other)])


@pytest.mark.fault(22)
def test_a_folder_that_is_used_in_another_way_is_not_merged(
    three: list[Path], tmp_path: Path, monkeypatch, capsys
) -> None:
    modules = [{"type": f"sentence_transformers.models.{name}", "path": path} for name, path in (
        ("Transformer", ""), ("Pooling", "1_Pooling"))]  # fmt: skip
    for name, mode, similarity, message in (
        ("max", "max_tokens", "cosine", "max is a sentence-transformers model with pooling by max"),
        ("dot", "mean_tokens", "dot", "dot compares vectors of any length by dot"),
    ):
        folder = say_usage(shutil.copytree(three[0], tmp_path / name), "", similarity_fn_name=similarity)
        (folder / "modules.json").write_text(json.dumps(modules))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "pooling"}))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling/config.json").write_text(json.dumps({f"pooling_mode_{mode}": True}))
        with pytest.raises(SystemExit):
            launcher(monkeypatch, folder, "-o", tmp_path / "out")
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def save_checkpoint(folder: str, data: dict[str, Any] | None = None) -> None:
    """folder/saved: a checkpoint of one rank."""
    changes = {"init_from": f"{folder}/hf", "steps": 0, "output_dir": f"{folder}/saved", "data": data or {}}
    config = train_config(Path(folder), **changes)
    from nemo_embed_core.data.tokenizer import load_tokenizer
    from nemo_embed_core.parallel.mesh import build_mesh
    from nemo_embed_core.train.preflight import Prepared
    from nemo_embed_core.train.trainer import Trainer

    dist.init_process_group("gloo")
    mesh = build_mesh(torch.device("cpu"), 1, 1, True)
    Trainer(config, mesh, Prepared(MODEL, load_tokenizer(config.tokenizer)), lambda message: None).run()


def test_what_a_run_was_trained_with_travels_to_its_export(
    server: Server, tmp_path: Path, monkeypatch, capsys
) -> None:
    write_hf(tmp_path / "hf", torch.float32)
    tasks = [
        DatasetConfig(path=str(tmp_path / f"{n}.jsonl"), task=f"find {n}", document_task=d)
        for n, d in ("a1", "b ")
    ]
    for dataset in tasks:
        write_rows(Path(dataset.path))
    data = {"datasets": tasks, "query_max_length": 24, "document_max_length": 40}
    assert server.run(save_checkpoint, 1, str(tmp_path), data)[0].code == 0
    launcher(monkeypatch, tmp_path / "saved", "-o", tmp_path / "out")
    settings = json.loads((tmp_path / "out/config_sentence_transformers.json").read_text())
    a, b = ({"q": f"Instruct: find {n}\nQuery: ", "d": f"Instruct: {d}\nQuery: "} for n, d in ("a1", "b "))
    assert settings["prompts"] == {"query": a["q"], "document": a["d"], "a": a["q"], "a-document": a["d"],
    "b": b["q"],
                                   "b-document": b["d"]}  # fmt: skip
    assert json.loads((tmp_path / "out/sentence_bert_config.json").read_text())["max_seq_length"] == 40
    usage = resolve(tmp_path / "out").usage
    assert (usage.query_max_length, usage.document_max_length, list(usage.prompts)) == (24, 40, ["a", "b"])
    said = capsys.readouterr().out
    assert json.dumps(b["d"]) in said and "default prompts: those of a, the sources' own default" in said
    assert "longest query: 24 tokens; longest document: 40 tokens" in said and "similarity: cosine" in said
    assert f"`{json.dumps(a['d'])}`" in (tmp_path / "out/README.md").read_text()


def test_a_flipped_bit_of_a_checkpoint_stops_its_merge(server: Server, tmp_path: Path) -> None:
    """Hashed while it is merged: what was read is never published unless it is what the manifest says."""
    write_hf(tmp_path / "hf", torch.float32)
    assert server.run(save_checkpoint, 1, str(tmp_path))[0].code == 0
    out = tmp_path / "out"
    with new_folder(out) as folder:
        write_weights(folder, open_sources([str(tmp_path / "saved")] * 2, lambda _: None), torch.float32)
    shutil.rmtree(out)
    file = next((tmp_path / "saved").glob("step-*/model-*"))
    for where in (-1, -5000):
        data = bytearray(file.read_bytes())
        data[where] ^= 0x40
        file.write_bytes(data)
        sources = open_sources([str(tmp_path / "saved"), str(tmp_path / "hf")])
        with pytest.raises(CheckpointError, match="sha256 differs"), new_folder(out) as folder:
            write_weights(folder, sources, torch.float32)
        assert not list(tmp_path.glob("*out*"))
    tokenizer = file.parent / "tokenizer.json"
    data = bytearray(tokenizer.read_bytes())
    data[len(data) // 2] ^= 1
    tokenizer.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: sha256 differs"):
        open_sources([str(tmp_path / "saved")])


def test_a_merge_that_cannot_write_says_where_and_leaves_nothing(
    three: list[Path], tmp_path: Path, monkeypatch
) -> None:
    real, calls = os.pwrite, [0]

    def full(fd: int, data: Any, at: int) -> int:
        calls[0] += 1
        if calls[0] == 3:
            raise OSError(28, os.strerror(28))
        return real(fd, data[: len(data) // 2 + 1], at)  # and no write is whole

    monkeypatch.setattr(os, "pwrite", full)
    sources = open_sources([str(path) for path in three])
    says = r"out.*No space left on device; the merged model needs [\d,]+ bytes"
    with pytest.raises(UserError, match=says), new_folder(tmp_path / "out") as folder:
        write_weights(folder, sources, torch.float32)
    assert calls[0] >= 3 and not list(tmp_path.iterdir())
    calls[0] = 3
    with new_folder(tmp_path / "out") as folder:
        write_weights(folder, open_sources([str(three[0])]), torch.float32)
    want = weights_of(three[0])
    assert all(torch.equal(got, want[name]) for name, got in weights_of(tmp_path / "out").items())


@pytest.mark.fault(22)
@pytest.mark.parametrize(
    "where", ["tokenizer.json", "config.json", "README.md", "merge-report.json", "2_Normalize"]
)
def test_a_disk_that_fills_beside_the_weights_ends_a_merge_with_the_bytes_it_needs(
    where: str, three: list[Path], tmp_path: Path, monkeypatch, capsys
) -> None:
    def fails(real):
        def call(self: Path, *args: Any, **options: Any) -> Any:
            if self.name == where and ".tmp-out" in str(self) and args[:1] != ("rb",):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(self, *args, **options)

        return call

    for name in ("open", "mkdir", "write_bytes", "write_text"):
        monkeypatch.setattr(Path, name, fails(getattr(Path, name)))
    with pytest.raises(SystemExit) as end:
        launcher(monkeypatch, *three[:2], "-o", tmp_path / "out")
    text = capsys.readouterr().err
    assert end.value.code == 2 and re.search(
        r"out: .*No space left on device.* needs [\d,]+ bytes, [\d,]+ are free", text
    )
    assert not list(tmp_path.iterdir())


def test_a_file_size_limit_ends_a_merge_as_a_full_disk_does(three: list[Path], tmp_path: Path) -> None:
    """The kernel's own refusal, at the weights and, above their size, at tokenizer.json."""
    source = shutil.copytree(three[0], tmp_path / "source")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    (source / "tokenizer.json").write_text(json.dumps(tokenizer) + " " * 3_000_000)
    for limit, place in ((100_000, "the weights"), (2_000_000, "the tokenizer")):
        code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
        code += "; import sys; sys.argv = sys.argv[1:]"
        code += "; import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
        command = [
            sys.executable,
            "-c",
            code,
            str(ROOT / "launch/merge.py"),
            str(source),
            "-o",
            str(tmp_path / "out"),
        ]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 2 and re.search(r"out.*File too large.* needs [\d,]+ bytes", run.stderr), (
            place,
            run.stderr,
        )
        assert [file.name for file in tmp_path.iterdir()] == ["source"], place


def test_room_is_asked_for_the_weights_and_the_rest_before_anything_is_written(
    three: list[Path], tmp_path: Path, monkeypatch, capsys
) -> None:
    weights = sum(w.nbytes for w in weights_of(three[0]).values())
    asked = []
    monkeypatch.setattr(stream, "check_free_space", lambda folder, needed, what: asked.append(needed))
    launcher(monkeypatch, three[0], "-o", tmp_path / "out")
    rest = sum(f.stat().st_size for f in (tmp_path / "out").rglob("*") if f.is_file()) - weights
    assert (
        len(asked) == 1
        and asked[0] >= weights + rest
        and asked[0] > weights + (three[0] / "tokenizer.json").stat().st_size
    )


# ------------------------------------------------------------------------------------------ killed


def merge_and_die(paths: list[str], output: str, call: str, count: int) -> None:
    """The mean of the sources, by a process that kills itself in the count-th os.pwrite, os.fsync or
    os.rename."""
    real, calls, lock = getattr(os, call), [0], threading.Lock()

    def fatal(*args: Any, **options: Any) -> Any:
        with lock:
            calls[0] += 1
            if calls[0] == count:
                if call == "pwrite":  # half of it is written
                    real(args[0], args[1][: len(args[1]) // 2], *args[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

    setattr(os, call, fatal)
    stream.BLOCK_ELEMENTS = 4096
    with new_folder(Path(output)) as folder:
        write_weights(folder, open_sources(paths), torch.float32)


@pytest.mark.fault(22)
@pytest.mark.parametrize(
    ("call", "count"), [("pwrite", 1), ("pwrite", 9), ("pwrite", 30), ("fsync", 1), ("rename", 1)]
)
def test_a_killed_merge_leaves_no_output_and_the_next_one_works(
    call: str, count: int, three: list[Path], server: Server, tmp_path: Path
) -> None:
    paths, out = [str(path) for path in three], tmp_path / "out"
    killed = server.run(merge_and_die, 1, paths, str(out), call, count)[0]
    assert killed.code == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".tmp-out-") and (left / "model.safetensors").exists()
    with new_folder(out) as folder:
        write_weights(folder, open_sources(paths), torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "what the killed merge left is gone"
    inputs = [weights_of(path) for path in three]
    for name, got in weights_of(out).items():
        assert torch.equal(got, (sum(w[name].double() for w in inputs) / 3).float())
