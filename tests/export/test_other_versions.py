"""What other versions of transformers and sentence-transformers make of both formats, against our embedder: a table.

`make compat` builds the environments and runs this; without them it is skipped. "causal" is found by replacing the last
token, alone and in padded batches, under eager and sdpa attention (export/reload.py).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import MODEL, write_tokenizer

from nemo_embed_core.embedder import Embedder
from nemo_embed_core.export.folder import hf_config
from nemo_embed_core.export.verify import TEXTS, reload_request, run_reload
from nemo_embed_core.model.hf import hf_shapes

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = [file.with_name("bin") / "python" for file in sorted(ROOT.glob(".venv-compat/*/.installed"))]
TOLERANCE = 1e-5
FLASH = Path(__file__).with_name("flash_stand_in.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ENVIRONMENTS, reason="no environments with other versions: `make compat` builds them"),
]


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, Path]:
    """The toy through launch/merge.py in both formats; each is proven there under the installed versions."""
    base = tmp_path_factory.mktemp("other-versions")
    source = write_tokenizer(base / "source")
    (source / "config.json").write_text(json.dumps(hf_config(MODEL, "float32", {"bos_token_id": 0})))
    generator = torch.Generator().manual_seed(0)
    # Large enough that attention looks around, and that a lost RoPE scaling shows.
    weights = {n: torch.randn(s, generator=generator) / s[-1] ** 0.5 for n, s in hf_shapes(MODEL).items()}
    save_file({n: 1 + w if w.dim() == 1 else w for n, w in weights.items()}, source / "model.safetensors")
    folders = {}
    for format in ("native", "compat"):
        # A dot in the name: transformers 4 makes the name of a module of it.
        folders[format] = base / f"toy-{format}-1.5"
        command = [sys.executable, "launch/merge.py", str(source), "-o", str(folders[format]), "--format", format]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folders


def versions(python: Path) -> dict[str, str]:
    names = ("transformers", "sentence_transformers", "torch")
    code = f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {names}}}))"
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def differences(found: dict[str, np.ndarray], ours_ND: np.ndarray) -> dict[str, float]:
    """Largest coordinate difference from our embedder, by who computed."""
    left_ND = found["left_padded_ND"]
    return {
        "transformers": float(np.abs(found["transformers_ND"] - ours_ND).max()),
        "left-padded": float(np.abs(left_ND - ours_ND[: len(left_ND)]).max()),
        "sentence-transformers": float(np.abs(found["sentence_transformers_ND"] - ours_ND).max()),
    }


def flash_difference(python: Path, folder: Path, scratch: Path) -> float:
    env = {**os.environ, "HF_MODULES_CACHE": str(scratch / "modules"), "PYTHONSAFEPATH": "1"}
    result = subprocess.run([python, FLASH, folder], cwd=scratch, env=env, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert found["num_calls"] == 3 * MODEL.num_hidden_layers
    assert found["is_causal"] is False
    return found["max_abs_diff"]


def test_compat_is_right_in_every_version_and_native_since_5_2(exports, tmp_path, capsys):
    ours = {f: Embedder.load(str(folder), "cpu", "fp32").encode(list(TEXTS)) for f, folder in exports.items()}
    assert np.array_equal(ours["native"], ours["compat"])
    rows, wrong = [], []
    for i, python in enumerate([*ENVIRONMENTS, Path(sys.executable)]):
        installed = versions(python)
        is_new = tuple(int(part) for part in installed["transformers"].split(".")[:2]) >= (5, 2)
        for format, folder in exports.items():
            scratch = tmp_path / f"{i}-{format}"
            scratch.mkdir()
            output = scratch / "vectors.npz"
            child = run_reload(str(python), folder, output, reload_request(TEXTS, 512, format == "compat"))
            assert child.returncode == 0, child.stderr
            with np.load(output, allow_pickle=False) as arrays:
                found = dict(arrays)
            assert found["transformers_version"] == installed["transformers"]  # not the one of .venv behind it
            is_bidirectional_C = found["first_state_changes"] > 0
            row = [installed["transformers"], installed["sentence_transformers"], format]
            if is_bidirectional_C.all():
                measured = differences(found, ours[format])
                if format == "compat":
                    measured["flash"] = flash_difference(python, folder, scratch)
                row += ["bidirectional", *(f"{value:.1e}" for value in measured.values())]
                wrong += [(*row[:3], name) for name, value in measured.items() if not value <= TOLERANCE]
            else:
                row += [f"causal in {(~is_bidirectional_C).sum()} of {len(is_bidirectional_C)} cases"]
            should_be = is_new or format == "compat"
            if not (is_bidirectional_C == should_be).all():
                wrong.append(tuple(row[:4]))
            rows.append(row)
    header = ["transformers", "sentence-transformers", "format", "attention", "transformers", "left-padded"]
    header += ["sentence-transformers", "flash"]
    with capsys.disabled():
        print(
            f"\n\nLargest difference of a coordinate from our embedder, {len(TEXTS)} texts, fp32, torch {torch.__version__};"
        )
        print("flash: its path with a stand-in for the kernel (flash_stand_in.py), against eager attention\n")
        for row in [header, ["---"] * len(header), *rows]:
            print("| " + " | ".join([*row, *[""] * (len(header) - len(row))]) + " |")
    assert not wrong, wrong
    assert {row[0].split(".")[0] for row in rows} == {"4", "5"}
