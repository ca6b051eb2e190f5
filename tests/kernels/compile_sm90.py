"""Compile for sm_90, without a GPU, every Triton kernel that the launchers would launch, and print what it
costs.

    PYTHONPATH=. python tests/kernels/compile_sm90.py [--recipe] [rms_norm rope ...]

--recipe: the shapes of the 8B recipe only. The launchers themselves run, on uninitialised CPU tensors of real
model shapes; instead of launching, the kernel with its argument types, constants and options is written down.
So what is compiled is what runs, in every configuration of the tables, and a new kernel cannot be forgotten.
One line per compiled kernel, then one JSON line with all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from nemo_embed_core.kernels import (
    adamw,
    dropout_linear,
    filter_scores,
    fp8,
    info_nce,
    mean_pool,
    pair_scores,
    quantize_rows,
    rms_norm,
    rope,
    rotate_quantize,
    swiglu,
)

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
}
launches: dict[tuple, dict] = {}


def record(kernel: JITFunction, *args, grid, warmup=False, num_warps=4, num_stages=3, **kwargs) -> None:
    """Instead of JITFunction.run: what its specialisation would be (16-byte aligned pointers, ints that are 1
    or 16 n)."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    assert list(values) and set(values) == set(kernel.arg_names), (
        f"{kernel.__name__}: {set(kernel.arg_names) ^ set(values)}"
    )
    constexpr_names = {p.name for p in kernel.params if p.is_constexpr}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = values[name]
        if name in constexpr_names or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype][1:]}{value.block_shape}>"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    # Recompiling for every divisibility of every int would multiply the list without telling more.
    shown = {
        name: value
        for name, value in constants.items()
        if (name in constexpr_names and not isinstance(value, str)) or value is None
    }
    dtype = next((t for t in ("bf16", "fp16") if any(t in signature[n] for n in kernel.arg_names)), "fp32")
    key = (kernel.__name__, dtype, json.dumps(shown), num_warps, num_stages)
    if key not in launches:
        launches[key] = {
            "source": ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
            "options": {"num_warps": num_warps, "num_stages": num_stages},
        }


def launch_everything(names: list[str], recipe: bool) -> None:
    """recipe: one shape of each kind, the 8B model's; else every entry of the tables, and both models'
    shapes."""
    for dtype in (torch.bfloat16, torch.float32):

        def empty(*shape: int, dtype=dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype).requires_grad_()

        def backward(*outputs: torch.Tensor) -> None:
            torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])

        if "rms_norm" in names and (dtype == torch.bfloat16 or not recipe):
            for hidden_size in (4096,) if recipe else (512, 1024, 2048, 4096, 8192):
                weight, (x, residual) = empty(hidden_size), (empty(16, hidden_size) for _ in range(2))
                for amax in (False, True):  # of fp8
                    if not recipe and hidden_size == 4096:
                        backward(*rms_norm.rms_norm_kernel(x, weight, 1e-5, None, amax)[:2])
                    backward(*rms_norm.rms_norm_kernel(x, weight, 1e-5, residual, amax)[:2])
        if "swiglu" in names and (dtype == torch.bfloat16 or not recipe):
            for num_blocks, width in ((8, 1792),) if recipe else ((8, 1024), (8, 1792)):
                for beside in (None, empty(dtype=torch.float32)):
                    gate_up = empty(16, 2 * num_blocks * width)
                    backward(swiglu.swiglu_kernel(gate_up, num_blocks, beside)[0])
        if "dropout_linear" in names and (dtype == torch.bfloat16 or not recipe):
            for columns in (4096,) if recipe else (2048, 4096, 8192, 14336):
                keys = torch.empty(16, dtype=torch.int64)
                dropout_linear.dropout_kernel(empty(16, columns).detach(), keys, 3, 0, 0.1)
        if "adamw" in names and (dtype == torch.bfloat16 or not recipe):  # dtype: of the gradient
            options = {"step": 2, "lr": 1e-5, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
            weight, remainder = adamw.split_master(torch.empty(4096, 4096))
            halves = [[x] for x in (weight, remainder, empty(4096, 4096).detach())]
            codes = (torch.int8, torch.uint8)
            for dtypes, block in (
                ((torch.float32,) * 2, 0),
                ((torch.bfloat16,) * 2, 0),
                *((codes, block) for block in ((256,) if recipe else (256, 32))),
            ):
                moments = [[torch.empty(4096, 4096, dtype=dtype)] for dtype in dtypes]
                bases = [torch.empty(4096, 4096 // block, dtype=torch.int16) for _ in codes] if block else []
                for columns in (4096,) if recipe else (4096, 14336):  # of the whole: cut by tp where more
                    places = [5, 7, columns]
                    adamw.adamw_kernel(*halves, *moments, torch.empty(()), bases, places, **options)
        if "fp8" in names and (dtype == torch.bfloat16 or not recipe):
            largest = fp8.amax_kernel(empty(16, 4096).detach())
            for to in (fp8.E4M3, fp8.E5M2):
                for layouts in ((True, False), (False, True), (True, True)):
                    fp8.quantize_kernel(empty(16, 4096).detach(), largest, to, *layouts)
            gathered = torch.empty(16, 4096, dtype=fp8.E4M3)
            fp8.quantize_kernel(gathered, largest, fp8.E4M3, False, True)
        if "rope" in names and (dtype == torch.bfloat16 or not recipe):
            heads = ((32, 8, 128),) if recipe else ((32, 8, 128), (32, 8, 64))
            for num_heads, num_kv_heads, head_dim in heads:
                tables = [torch.empty(16, head_dim // 2) for _ in range(2)]
                qkv = empty(16, (num_heads + 2 * num_kv_heads) * head_dim)
                backward(*rope.split_rope_kernel(qkv, *tables, num_heads, num_kv_heads, head_dim))
        if "mean_pool" in names and (dtype == torch.bfloat16 or not recipe):
            cu_seqlens = torch.arange(0, 161, 16, dtype=torch.int32)
            for hidden_size in (4096,) if recipe else (2048, 4096, 8192, 16384):
                backward(mean_pool.segment_sum_kernel(empty(160, hidden_size), cu_seqlens, 16))
                if not recipe:
                    backward(mean_pool.mean_pool_kernel(empty(160, hidden_size), cu_seqlens))
                # Short and long sequences.
                for bounds in (cu_seqlens, torch.tensor([0, 2100], dtype=torch.int32)):
                    backward(mean_pool.mean_pool_kernel(empty(int(bounds[-1]), hidden_size), bounds, True))
        if "quantize_rows" in names and (dtype == torch.bfloat16 or not recipe):
            for hidden_size in (4096,) if recipe else (384, 1024, 2048, 4096, 8192, 16384):
                for stored in (torch.int8, torch.bfloat16):
                    quantize_rows.quantize_rows_kernel(empty(16, hidden_size).detach(), stored)
                quantize_rows.square_rows_kernel(empty(16, hidden_size).detach())
        if "rotate_quantize" in names and (dtype == torch.bfloat16 or not recipe):
            for hidden_size in (4096,) if recipe else (256, 512, 1024, 2048, 4096, 8192, 16384):
                if rotate_quantize.is_rotatable(hidden_size, dtype):
                    rotate_quantize.rotate_quantize_kernel(
                        empty(16, hidden_size).detach(), torch.ones(hidden_size)
                    )
        if "pair_scores" in names and (dtype == torch.bfloat16 or not recipe):
            for hidden_size in (4096,) if recipe else (384, 1024, 2048, 4096, 8192, 16384):
                rows, ids = torch.zeros(16, dtype=torch.int64), torch.zeros(16, dtype=torch.int64)
                q, documents = (
                    empty(16, hidden_size, dtype=torch.float32).detach(),
                    empty(16, hidden_size).detach(),
                )
                pair_scores.pair_scores_kernel(q, rows, documents, ids)
        if "filter_scores" in names and dtype == torch.bfloat16:
            vector = torch.empty(512)
            for stored in (torch.int8, torch.bfloat16):
                rows, scales = (
                    torch.empty(512, 4096, dtype=stored),
                    (vector, vector) if stored == torch.int8 else (None, None),
                )
                filter_scores.filter_scores_kernel(rows, rows, vector, vector, 1024, *scales, vector, *scales)
        if "info_nce" in names:
            temperature = torch.tensor(0.02, requires_grad=True)
            hard = ((5, 4096),) if dtype == torch.float32 else ()  # scored_dtype of the recipe
            for num_documents, hidden_size in hard if recipe else ((2, 2048), (5, 4096)):
                mask = torch.ones(16, num_documents, dtype=torch.bool)
                for normalize in (False,) if recipe else (False, True):
                    q, docs = empty(16, hidden_size), empty(16, num_documents, hidden_size)
                    backward(info_nce.info_nce_hard_kernel(q, docs, mask, temperature, normalize))
            for num_rows in (144,) if recipe else (16, 64, 144):
                labels, valid = torch.zeros(num_rows, dtype=torch.int64), torch.ones(512, dtype=torch.bool)
                ids = torch.arange(512)
                q, docs, own = empty(num_rows, 4096), empty(512, 4096), empty(num_rows, 4, 4096)
                backward(info_nce.info_nce_in_batch_kernel(q, docs, labels, temperature, ids, valid))
                if not recipe:
                    rules = {
                        "known_ids_BJ": torch.zeros(num_rows, 3, dtype=torch.int64),
                        "limits_B": torch.zeros(num_rows),
                    }
                    for chosen in (rules.keys(), ["known_ids_BJ"], ["limits_B"]):
                        options = {name: rules[name] for name in chosen}
                        backward(
                            info_nce.info_nce_in_batch_kernel(
                                q, docs, labels, temperature, ids, valid, **options
                            )
                        )
                if not recipe and num_rows == 144:
                    backward(info_nce.info_nce_in_batch_kernel(q, docs, labels, temperature, ids, valid, own))
                    backward(info_nce.info_nce_in_batch_kernel(q, docs, labels, temperature))
                    backward(info_nce.in_batch_logsumexp_kernel(q, docs, temperature, ids[:144], ids))


def tool(name: str) -> str:
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return str(bundled) if bundled.exists() else name


def usage(cubin: bytes) -> dict[str, int]:
    """registers of a thread, and spills: instructions on local memory. (The stack size also counts bytes that
    nobody uses.)"""

    def report(*arguments: str) -> str:
        return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        match = re.search(r"REG:(\d+) STACK:(\d+)", report(tool("cuobjdump"), "-res-usage", file.name))
        assert match is not None
        code = report(tool("nvdisasm"), "-c", file.name) if int(match[2]) else ""
    return {"registers": int(match[1]), "spills": len(re.findall(r"\b(?:LDL|STL)\b", code))}


def main() -> None:
    assert os.environ.get("TRITON_INTERPRET", "0") == "0", (
        "interpreted kernels cannot be compiled: unset TRITON_INTERPRET"
    )
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", action="store_true", help="only the shapes of the 8B recipe")
    parser.add_argument(
        "files",
        nargs="*",
        default=[
            *("adamw", "fp8", "rms_norm", "rope", "swiglu", "dropout_linear", "mean_pool", "info_nce"),
            *("quantize_rows", "rotate_quantize", "pair_scores", "filter_scores"),
        ],
    )
    options = parser.parse_args()
    started = time.perf_counter()
    JITFunction.run = record
    launch_everything(options.files, options.recipe)
    rows = []
    for (name, dtype, constants, num_warps, num_stages), launch in launches.items():
        begin = time.perf_counter()
        kernel = triton.compile(launch["source"], target=GPUTarget("cuda", 90, 32), options=launch["options"])
        row = {"kernel": name, "dtype": dtype, "num_warps": num_warps, "num_stages": num_stages}
        row |= usage(kernel.asm["cubin"])
        row |= {
            "constants": json.loads(constants),
            "shared": kernel.metadata.shared,
            "wgmma": "wgmma" in kernel.asm["ptx"],
            "vectors": bool(re.search(r"(ld|st)\.global[^;]*\.v[48]|cp\.async", kernel.asm["ptx"])),
        }
        rows.append(row)
        shown = " ".join(f"{k}={v}" for k, v in row["constants"].items())
        print(
            f"{name:26s} {dtype:5s} warps {num_warps:2d} registers {row['registers']:3d} spills "
            f"{row['spills']:3d} "
            f"shared {row['shared']:6d} {'wgmma' if row['wgmma'] else '     '} "
            f"{'vec' if row['vectors'] else '   '} "
            f"{time.perf_counter() - begin:5.2f} s  {shown}",
            flush=True,
        )
    print(
        f"triton {triton.__version__}: {len(rows)} kernels compiled in {time.perf_counter() - started:.0f} s"
    )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
