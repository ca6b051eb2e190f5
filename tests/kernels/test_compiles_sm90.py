"""Every kernel compiles for sm_90 without a GPU, into registers, with vector loads and wgmma where they are
due."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def compile_all(*arguments: str) -> list[dict]:
    bundled = Path(find_spec("triton").origin).parent / "backends/nvidia/bin"
    missing = [tool for tool in ("ptxas", "cuobjdump", "nvdisasm") if not (bundled / tool).exists()]
    if missing:
        pytest.skip(f"triton was installed without {', '.join(missing)}: nothing here can assemble for sm_90")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_DEFAULT_FP_FUSION": "1"}  # the default until triton 3.10
    command = [sys.executable, str(Path(__file__).with_name("compile_sm90.py")), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    table, _, rows = result.stdout.rstrip().rpartition("\n")
    print(table)
    return json.loads(rows)


def check(rows: list[dict]) -> None:
    # triton 3.6's ptxas parks a scalar of two kernels: one store and one load. 3.9's spills nothing.
    allowed = 0 if tuple(map(int, version("triton").split(".")[:2])) >= (3, 9) else 2
    assert [row for row in rows if row["spills"] > allowed] == []
    assert [row for row in rows if row["shared"] > 227 * 1024] == [], "more shared memory than an SM has"
    # 64 rows and more go to the tensor cores through wgmma; rows of 4096 are read 16 bytes at a time, but for
    # pair_scores, which has more loads of 8 bytes in flight and was faster so.
    slow = [row for row in rows if row["constants"].get("BLOCK_B", 0) >= 64 and "BLOCK_P" in row["constants"]]
    assert slow and [row for row in slow if not row["wgmma"]] == []
    wide = [
        row for row in rows if row["constants"].get("D") == 4096 and row["kernel"] != "_pair_scores_kernel"
    ]
    assert [row for row in wide if not row["vectors"]] == []


@pytest.mark.parametrize(
    "arguments", [["--recipe"], pytest.param([], marks=pytest.mark.slow)], ids=["recipe", "everything"]
)
def test_every_kernel_compiles_without_spills(arguments: list[str]) -> None:
    rows = compile_all(*arguments)
    kernels = {row["kernel"] for row in rows}
    sources = [file.read_text() for file in (ROOT / "kernels").glob("*.py")]
    kernel = r"@triton\.jit(?:\(.*\))?\ndef (\w+_kernel)\("
    defined = {name for source in sources for name in re.findall(kernel, source)}
    assert kernels == defined, f"never launched by compile_sm90.py: {defined - kernels}"
    check(rows)
