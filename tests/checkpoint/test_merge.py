"""merge(save(load(x))) is x, bit for bit; averages are correctly rounded; nothing half-written is left."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny import MODEL, train_config, write_tokenizer

from nemo_embed_core.checkpoint import merge, sharded
from nemo_embed_core.checkpoint.weights import RandomReader, open_weights
from nemo_embed_core.config import ModelConfig, UserError
from nemo_embed_core.model import hf


def write_hf(folder: Path, dtype: torch.dtype, seed: int = 0, config: ModelConfig = MODEL) -> Path:
    """A Hugging Face folder with random weights, written without our merger."""
    from nemo_embed_core.export.folder import hf_config

    write_tokenizer(folder)
    reader, weights = RandomReader(config, seed), {}
    for name, shape in hf.parameter_shapes(config).items():
        noise = torch.rand(shape) * 0.1
        weights.update(hf.to_hf(name, (reader.read_box(name, ((0,) * len(shape), shape)) + noise).to(dtype), config))
    save_file({n: w.contiguous() for n, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    values = hf_config(config, str(dtype).removeprefix("torch."), {"bos_token_id": 0})
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def save_on_mesh(rank: int, world_size: int, init_file: str, folder: str, sources: list[str]) -> None:
    """Load each source under tp = 1, 2, 4 (the rest of the ranks are dp) and save it untrained (steps = 0)."""
    from nemo_embed_core.data.tokenizer import load_tokenizer
    from nemo_embed_core.parallel.mesh import build_mesh
    from nemo_embed_core.train.trainer import Prepared, Trainer

    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=world_size)
    for source in sources:
        for tp in (1, 2, 4):
            output = f"{folder}/saved-{Path(source).name}-{tp}"
            config = train_config(Path(folder), init_from=source, steps=0, output_dir=output)
            mesh = build_mesh(torch.device("cpu"), world_size // tp, tp, True)
            Trainer(config, mesh, Prepared(MODEL, load_tokenizer(config.tokenizer)), lambda message: None).run()


@pytest.mark.dist
def test_load_save_merge_is_bitwise_the_identity(tmp_path: Path) -> None:
    train_config(tmp_path)
    folders = {d: write_hf(tmp_path / str(d).removeprefix("torch."), d) for d in (torch.bfloat16, torch.float32)}
    run_ranks(save_on_mesh, 4, str(tmp_path), [str(f) for f in folders.values()])
    for dtype, folder in folders.items():
        want = load_file(folder / "model.safetensors")
        for tp in (1, 2, 4):
            saved = open_weights(str(tmp_path / f"saved-{folder.name}-{tp}"))
            layout = saved.reader.manifest["layout"]
            assert layout == {"tp_size": tp, "dp_size": 4 // tp} and saved.dtype == dtype
            out = tmp_path / f"merged-{folder.name}-{tp}"
            out.mkdir()
            merge.write_weights(out, [saved], merge.dtype_of("auto", [saved]))
            got = load_file(out / "model.safetensors")
            assert got.keys() == want.keys()
            for name in want:
                assert got[name].dtype == dtype and torch.equal(got[name], want[name]), f"{dtype} tp={tp}: {name}"


def test_sharded_output_is_read_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_weights(str(write_hf(tmp_path / "hf", torch.float32)))
    monkeypatch.setattr(merge, "SHARD_BYTES", 60_000)
    monkeypatch.setattr(merge, "BLOCK_ELEMENTS", 1000)
    out = write_hf(tmp_path / "out", torch.float32, seed=9)
    (out / "model.safetensors").unlink()
    merge.write_weights(out, [source], torch.float32)
    assert len(list(out.glob("model-*.safetensors"))) > 3
    again = open_weights(str(out))
    for name, shape in hf.parameter_shapes(MODEL).items():
        box = ((0,) * len(shape), shape)
        assert torch.equal(again.reader.read_box(name, box), source.reader.read_box(name, box))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_average_of_three_is_correctly_rounded(tmp_path: Path, dtype: torch.dtype) -> None:
    paths = [str(write_hf(tmp_path / f"m{i}", torch.bfloat16, seed=i)) for i in range(3)]
    sources = merge.open_sources(paths)
    merge.write_weights(tmp_path, sources, dtype)
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
    """1 + 2^-8 + 2^-40 lies above the tie between two bf16 values; through fp32 it lands on the tie and rounds down."""
    x = torch.tensor([1 + 2**-8 + 2**-40, -(1 + 2**-8 + 2**-40), 1 + 2**-8, 1e-46, -1e-46, 0.0], dtype=torch.float64)
    assert x[:1].to(torch.bfloat16).item() == 1.0, "torch's own cast rounds twice"
    want = [1 + 2**-7, -(1 + 2**-7), 1.0, 0.0, -0.0, 0.0]
    assert merge.round_once(x, torch.bfloat16).tolist() == want


def test_sources_of_other_shapes_and_non_finite_weights_are_refused(tmp_path: Path) -> None:
    a = write_hf(tmp_path / "a", torch.float32)
    b = write_hf(tmp_path / "b", torch.float32, config=dataclasses.replace(MODEL, num_hidden_layers=1))
    with pytest.raises(UserError, match="num_hidden_layers: 2 and 1"):
        merge.open_sources([str(a), str(b)])
    weights = load_file(a / "model.safetensors")
    weights["layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, a / "model.safetensors")
    with pytest.raises(UserError, match=r"layers.1.mlp.up_proj.weight has NaN or infinite values in .*a"):
        merge.write_weights(tmp_path, merge.open_sources([str(a)]), torch.float32)


def test_a_missing_or_doubled_piece_is_found(tmp_path: Path) -> None:
    pieces = [{"file": "a", "offset": [0, 0], "size": [2, 4]}, {"file": "b", "offset": [2, 0], "size": [2, 4]}]
    sharded._check_coverage(tmp_path, "w", [4, 4], pieces)
    with pytest.raises(sharded.CheckpointError, match="w has 8 of 16 elements"):
        sharded._check_coverage(tmp_path, "w", [4, 4], pieces[:1])
    with pytest.raises(sharded.CheckpointError, match="stored twice, in c and a"):
        sharded._check_coverage(tmp_path, "w", [4, 4], [*pieces, {"file": "c", "offset": [1, 0], "size": [1, 4]}])
    with pytest.raises(sharded.CheckpointError, match="outside its shape"):
        sharded._check_coverage(tmp_path, "w", [3, 4], pieces)
