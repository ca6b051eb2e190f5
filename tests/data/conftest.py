"""A small sentencepiece tokenizer, trained once a session on sources of the standard library (they are
everywhere)."""

import sysconfig
from pathlib import Path

import pytest

from nemo_embed_core.data.tokenizer import train_sentencepiece


def stdlib_text(*names: str) -> list[str]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [(folder / name).read_text(encoding="utf-8") for name in names]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(
        stdlib_text("argparse.py", "textwrap.py", "dataclasses.py"), 800, folder, max_length=64
    )
    return folder


@pytest.fixture
def tokenizer(tokenizer_folder):
    from nemo_embed_core.data.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer_folder)
