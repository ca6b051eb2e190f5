"""Which code this is, as reports and model cards name it."""

import shutil
import subprocess
from pathlib import Path

from nemo_embed_core import __version__


def code_version() -> str:
    """nemo_embed_core 1.2.3, and the commit in a git checkout."""
    root = Path(__file__).resolve().parents[1]
    version = f"nemo_embed_core {__version__}"
    if not (root / ".git").exists() or shutil.which("git") is None:
        return version

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "HEAD")
    changes = " with changes" if git("status", "--porcelain") else ""
    return f"{version}, commit {commit}{changes}" if commit else version
