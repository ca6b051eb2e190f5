"""Which code this is, as reports and model cards name it."""

import shutil
import subprocess
from pathlib import Path

from nemo_embed_core import __version__

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ("benchmarks/results", "docs/experiments")  # what measurements write: another one's is no change


def commit(root: Path = ROOT) -> tuple[str, bool]:
    """(of the git checkout, "" where it is none; whether its files are others than the commit's)"""
    if not (root / ".git").exists() or shutil.which("git") is None:
        return "", False

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True).stdout.strip()

    others = (f":(exclude){folder}" for folder in MEASURED)
    return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", ".", *others))


def code_version() -> str:
    """nemo_embed_core 1.2.3, and the commit in a git checkout."""
    version = f"nemo_embed_core {__version__}"
    sha, is_changed = commit()
    return f"{version}, commit {sha}{' with changes' if is_changed else ''}" if sha else version
