"""Compile for sm_90, without a GPU, every Triton kernel that the launchers would launch, and print what it costs.

    python tests/kernels/compile_sm90.py [rms_norm rope swiglu mean_pool info_nce]

The launchers themselves run, on uninitialised CPU tensors of real model shapes; instead of launching, the kernel with its
argument types, constants and options is written down. So what is compiled is what runs, in every configuration of the
tables, and a new kernel cannot be forgotten. One line per compiled kernel, then one JSON line with all of them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

assert os.environ.get("TRITON_INTERPRET", "0") == "0", "interpreted kernels cannot be compiled: unset TRITON_INTERPRET"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from nemo_embed_core.kernels import info_nce, mean_pool, rms_norm, rope, swiglu

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
launches: dict[tuple, dict] = {}


def record(kernel: JITFunction, *args, grid, warmup=False, num_warps=4, num_stages=3, **kwargs) -> None:
    """Instead of JITFunction.run: what its specialisation would be (16-byte aligned pointers, ints that are 1 or 16 n)."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    assert list(values) and set(values) == set(kernel.arg_names), f"{kernel.__name__}: {set(kernel.arg_names) ^ set(values)}"
    constexpr_names = {p.name for p in kernel.params if p.is_constexpr}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = values[name]
        if name in constexpr_names or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    # Recompiling for every divisibility of every int would multiply the list without telling more.
    shown = {name: value for name, value in constants.items() if name in constexpr_names}
    dtype = next((t for t in (signature[n] for n in kernel.arg_names) if t in ("*bf16", "*fp16")), "*fp32")[1:]
    key = (kernel.__name__, dtype, json.dumps(shown), num_warps, num_stages)
    if key not in launches:
        launches[key] = {
            "source": ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
            "options": {"num_warps": num_warps, "num_stages": num_stages},
        }


def launch_everything(names: list[str]) -> None:
    for dtype in (torch.bfloat16, torch.float32):

        def empty(*shape: int, dtype=dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype).requires_grad_()

        def backward(*outputs: torch.Tensor) -> None:
            torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])

        if "rms_norm" in names:
            # 16384 is twice the widest Llama; 65536 in bf16 only, where a row of fp32 still fits the registers.
            for hidden_size in (100, 512, 1024, 2048, 4096, 8192, 16384):
                backward(*rms_norm.rms_norm_kernel(empty(16, hidden_size), empty(hidden_size), 1e-5))
                x, residual = empty(16, hidden_size), empty(16, hidden_size)
                backward(*rms_norm.rms_norm_kernel(x, empty(hidden_size), 1e-5, residual))
        if "swiglu" in names:
            for num_blocks, width in ((8, 1024), (8, 1792), (1, 1792), (2, 100)):
                backward(swiglu.swiglu_kernel(empty(16, 2 * num_blocks * width), num_blocks))
        if "rope" in names:
            for num_heads, num_kv_heads, head_dim in ((32, 8, 128), (32, 8, 64), (4, 1, 128), (6, 2, 100)):
                tables = [torch.empty(16, head_dim // 2) for _ in range(2)]
                qkv = empty(16, (num_heads + 2 * num_kv_heads) * head_dim)
                backward(*rope.split_rope_kernel(qkv, *tables, num_heads, num_kv_heads, head_dim))
        if "mean_pool" in names:
            cu_seqlens = torch.arange(0, 161, 16, dtype=torch.int32)
            for hidden_size in (100, 2048, 4096, 8192):
                backward(mean_pool.segment_sum_kernel(empty(160, hidden_size), cu_seqlens, 16))
                for normalize in (False, True):
                    backward(mean_pool.mean_pool_kernel(empty(160, hidden_size), cu_seqlens, normalize))
                    x, weight = empty(160, hidden_size), empty(hidden_size)
                    backward(mean_pool.mean_pool_kernel(x, cu_seqlens, normalize, weight))
        if "info_nce" in names:
            temperature = torch.tensor(0.02, requires_grad=True)
            for num_documents, hidden_size in ((2, 2048), (5, 4096), (8, 4096), (3, 100)):
                mask = torch.ones(16, num_documents, dtype=torch.bool)
                for normalize in (False, True):
                    q, docs = empty(16, hidden_size), empty(16, num_documents, hidden_size)
                    backward(info_nce.info_nce_hard_kernel(q, docs, mask, temperature, normalize))
            for num_rows in (16, 64, 144):
                labels, valid = torch.zeros(num_rows, dtype=torch.int64), torch.ones(512, dtype=torch.bool)
                ids = torch.arange(512)
                for hidden_size, extras in ((4096, (ids, valid)), (4096, ()), (100, (ids, valid))):
                    if hidden_size == 100 and num_rows != 144:
                        continue
                    q, docs = empty(num_rows, hidden_size), empty(512, hidden_size)
                    own = (empty(num_rows, 4, hidden_size),) if extras else ()
                    backward(info_nce.info_nce_in_batch_kernel(q, docs, labels, temperature, *extras, *own))
                backward(info_nce.in_batch_logsumexp_kernel(empty(num_rows, 4096), empty(512, 4096), temperature))


def tool(name: str) -> str:
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return str(bundled) if bundled.exists() else name


def usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True)
    match = re.search(r"REG:(\d+) STACK:(\d+)", report.stdout)
    assert match, report.stdout
    return {"registers": int(match[1]), "stack": int(match[2])}


def main() -> None:
    started = time.perf_counter()
    JITFunction.run = record
    launch_everything(sys.argv[1:] or ["rms_norm", "rope", "swiglu", "mean_pool", "info_nce"])
    rows = []
    for (name, dtype, constants, num_warps, num_stages), launch in launches.items():
        begin = time.perf_counter()
        kernel = triton.compile(launch["source"], target=GPUTarget("cuda", 90, 32), options=launch["options"])
        row = {"kernel": name, "dtype": dtype, "constants": json.loads(constants), "num_warps": num_warps, "num_stages": num_stages}
        row |= usage(kernel.asm["cubin"])
        row |= {
            "shared": kernel.metadata.shared,
            "wgmma": "wgmma" in kernel.asm["ptx"],
            "vectors": bool(re.search(r"(ld|st)\.global[^;]*\.v[48]|cp\.async", kernel.asm["ptx"])),
        }
        rows.append(row)
        shown = " ".join(f"{k}={v}" for k, v in row["constants"].items())
        print(
            f"{name:26s} {dtype:5s} warps {num_warps:2d} registers {row['registers']:3d} stack {row['stack']:4d} "
            f"shared {row['shared']:6d} {'wgmma' if row['wgmma'] else '     '} {'vec' if row['vectors'] else '   '} "
            f"{time.perf_counter() - begin:5.2f} s  {shown}",
            flush=True,
        )
    print(f"triton {triton.__version__}: {len(rows)} kernels compiled in {time.perf_counter() - started:.0f} s")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
