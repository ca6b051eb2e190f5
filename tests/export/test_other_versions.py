"""What other versions of transformers and sentence-transformers make of both formats, against our embedder: a
table.

`make compat` builds the environments and runs this; without them it is skipped. "causal" is found by
replacing the last token, alone and in padded batches, under eager and sdpa attention (export/reload.py).
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
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from nemo_embed_core.checkpoint.source import Prompts
from nemo_embed_core.encoders.embedder import Embedder
from nemo_embed_core.export.consumers import NUM_PROMPTED, TEXTS, reload_request, run_reload
from nemo_embed_core.export.folder import hf_config
from nemo_embed_core.model.spec import hf_shapes

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = [file.with_name("bin") / "python" for file in sorted(ROOT.glob(".venv-compat/*/.installed"))]
TOLERANCE = 1e-5
FLASH = Path(__file__).with_name("flash_stand_in.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not ENVIRONMENTS, reason="no environments with other versions: `make compat` builds them"
    ),
]


def byte_level(folder: Path) -> None:
    """In the manner of Llama 3."""
    write_tokenizer(folder)


def sentencepiece_like(folder: Path) -> None:
    """In the manner of Llama 2, with all that its tokenizer_config.json may ask for and tokenizer.json does
    not do."""
    special = ["<unk>", "<s>", "</s>"]
    pieces = [*special, *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "n"), ("▁", "a"), ("▁", "▁"), ("r", "n")]
    pieces += ["".join(merge) for merge in merges]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        **{
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        },
        **dict.fromkeys(
            ("add_bos_token", "add_eos_token", "legacy", "do_lower_case", "add_prefix_space"), True
        ),
        **dict.fromkeys(("truncation_side", "padding_side"), "left"),
        **{
            "additional_special_tokens": ["<new>"],
            "model_max_length": 40,
            "clean_up_tokenization_spaces": True,
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(b"what a slow tokenizer would read")


def prefixed(folder: Path) -> None:
    """A prefix space, which transformers 4 takes away unless it is told; sides and limits inside
    tokenizer.json."""
    write_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.enable_truncation(33, direction="left")
    tokenizer.enable_padding(direction="left", length=50, pad_id=1, pad_token="<|end_of_text|>")
    tokenizer.save(str(folder / "tokenizer.json"))


KINDS = {"byte-level": byte_level, "sentencepiece-like": sentencepiece_like, "prefix space": prefixed}
PROMPTS = Prompts("Instruct: find it \nQuery: ", "Instruct: a passage\nQuery: ")


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """The toy through launch/merge.py in both formats; each is proven there under the installed versions."""
    base = tmp_path_factory.mktemp("other-versions")
    generator = torch.Generator().manual_seed(0)
    # Large enough that attention looks around, and that a lost RoPE scaling shows.
    weights = {n: torch.randn(s, generator=generator) / s[-1] ** 0.5 for n, s in hf_shapes(MODEL).items()}
    folders = {}
    for kind, write in KINDS.items():
        source = base / kind
        source.mkdir()
        write(source)
        (source / "config.json").write_text(json.dumps(hf_config(MODEL, "float32", {"bos_token_id": 0})))
        save_file({n: 1 + w if w.dim() == 1 else w for n, w in weights.items()}, source / "model.safetensors")
        for format in ("native", "compat"):
            if format == "native" and kind != "byte-level":
                continue  # the compat one has the same files, but for the class
            # A dot in the name: transformers 4 makes the name of a module of it.
            folders[format, kind] = base / f"toy-{len(folders)}-{format}-1.5"
            command = [sys.executable, "launch/merge.py", str(source), "-o", str(folders[format, kind])]
            command += ["--format", format, "--task", "find it ", "--document-task", "a passage"]
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folders


def versions(python: Path) -> dict[str, str]:
    names = ("transformers", "sentence_transformers", "torch")
    code = (
        "import json; from importlib.metadata import version; "
        f"print(json.dumps({{n: version(n) for n in {names}}}))"
    )
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def differences(folder: Path, found: dict[str, np.ndarray], strips: bool) -> dict[str, float]:
    """Largest coordinate difference from our embedder, by who computed, and how many texts have other tokens.

    strips: sentence-transformers before 6 takes white space off both ends of prompt and text, whatever the
    folder says.
    """
    encode = Embedder.load(str(folder), "cpu", "fp32").encode
    texts, left_ND = list(TEXTS), found["left_padded_ND"]
    theirs = [text.strip() if strips else text for text in texts]
    ours_ND = encode(texts)
    measured = {
        "transformers": float(np.abs(found["transformers_ND"] - ours_ND).max()),
        "left-padded": float(np.abs(left_ND - ours_ND[: len(left_ND)]).max()),
        "sentence-transformers": float(np.abs(found["sentence_transformers_ND"] - encode(theirs)).max()),
    }
    for side, prompt in (("queries", PROMPTS.query), ("documents", PROMPTS.document)):
        given = [prompt + text for text in texts[:NUM_PROMPTED]]
        rows = encode([text.strip() for text in given] if strips else given)
        measured[side] = float(np.abs(found[f"{side}_MD"] - rows).max())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    tokenizer.enable_truncation(512)
    wrong = 0
    for prefix, given in (("", texts), ("st_", theirs)):
        long_text = texts[-1] * int(found["num_repeats"])
        ends = found[f"{prefix}token_counts"].cumsum()[:-1]
        rows = np.split(found[f"{prefix}token_ids"], ends)
        wrong += sum(
            row.tolist() != tokenizer.encode(t).ids for row, t in zip(rows, [*given, long_text], strict=True)
        )
    return {**measured, "other tokens": wrong}


def flash_difference(python: Path, folder: Path, scratch: Path) -> float:
    env = {**os.environ, "HF_MODULES_CACHE": str(scratch / "modules"), "PYTHONSAFEPATH": "1"}
    result = subprocess.run(
        [python, FLASH, folder], cwd=scratch, env=env, capture_output=True, text=True, check=True
    )
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert found["num_calls"] == 3 * MODEL.num_hidden_layers
    assert found["is_causal"] is False
    return found["max_abs_diff"]


def test_compat_is_right_in_every_version_and_native_since_5_2(exports, tmp_path, capsys):
    rows, wrong = [], []
    for i, python in enumerate([*ENVIRONMENTS, Path(sys.executable)]):
        installed = versions(python)
        is_new = tuple(int(part) for part in installed["transformers"].split(".")[:2]) >= (5, 2)
        strips = int(installed["sentence_transformers"].split(".")[0]) < 6
        for (format, kind), folder in exports.items():
            scratch = tmp_path / f"{i}-{folder.name}"
            scratch.mkdir()
            output = scratch / "vectors.npz"
            child = run_reload(str(python), folder, output, reload_request(TEXTS, 512, format == "compat"))
            assert child.returncode == 0, child.stderr
            with np.load(output, allow_pickle=False) as arrays:
                found = dict(arrays)
            # Not the one of .venv behind it.
            assert found["transformers_version"] == installed["transformers"]
            is_bidirectional_C = found["first_state_changes"] > 0
            row = [installed["transformers"], installed["sentence_transformers"], format, kind]
            if is_bidirectional_C.all():
                measured = differences(folder, found, strips)
                assert json.loads(str(found["prompts"])) == PROMPTS._asdict()
                assert str(found["similarity"]) == "cosine"
                if format == "compat":
                    measured["flash"] = flash_difference(python, folder, scratch)
                row += ["bidirectional", *(f"{value:.1e}" for value in measured.values())]
                wrong += [(*row[:4], name) for name, value in measured.items() if not value <= TOLERANCE]
            else:
                row += [f"causal in {(~is_bidirectional_C).sum()} of {len(is_bidirectional_C)} cases"]
            should_be = is_new or format == "compat"
            if not (is_bidirectional_C == should_be).all():
                wrong.append(tuple(row[:5]))
            rows.append(row)
    header = [
        "transformers",
        "sentence-transformers",
        "format",
        "tokenizer",
        "attention",
        "transformers",
        "left-padded",
    ]
    header += ["sentence-transformers", "queries", "documents", "other tokens", "flash"]
    with capsys.disabled():
        print(
            f"\n\nLargest difference of a coordinate from our embedder, {len(TEXTS)} texts, fp32, "
            f"torch {torch.__version__};"
        )
        print("flash: its path with a stand-in for the kernel (flash_stand_in.py), against eager attention\n")
        for row in [header, ["---"] * len(header), *rows]:
            print("| " + " | ".join([*row, *[""] * (len(header) - len(row))]) + " |")
    assert not wrong, wrong
    assert {row[0].split(".")[0] for row in rows} == {"4", "5"}
