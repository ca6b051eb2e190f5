"""A folder that was proven onto the Hugging Face hub: its files, its card under its name there, and what mteb
is told of it.

    publish(folder, Push("user/name"), say)     -> the commit's id, "" of a dry run

The folder stays as it is: README.md with the name and the scores of reports, and model_meta.json, are made
for the hub.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation import model_meta
from nemo_embed_core.export import front_matter, hub
from nemo_embed_core.export.hub import Push

CARD = "README.md"


def check_push(push: Push) -> None:
    """UserError, before the work that makes the folder, where mteb is missing or the hub would refuse."""
    if find_spec("mteb") is None:  # looked for, not imported: that would take the hub for out of reach
        raise UserError("--push-to-hub needs mteb: pip install 'nemo_embed_core[eval]'")
    if not push.dry_run:
        hub.check_login(push)


def publish(folder: Path, push: Push, say: Callable[[str], None]) -> str:
    """UserError names what to run again, where the hub did not take it."""
    files: dict[str, Path | bytes] = {**hub.files_of(folder)}
    if CARD not in files:
        raise UserError(f"{folder} has no {CARD}: export it with launch/merge.py")
    results = model_meta.results_of(folder, push.reports)
    text = (folder / CARD).read_text(encoding="utf-8")
    card, fields = front_matter.published(text, push.repo, results, folder / CARD)
    files[CARD] = card.encode()
    files[model_meta.FILE] = model_meta.model_meta(folder, push.repo, fields)
    for name, content in sorted(files.items()):
        say(f"  {name}: {hub.size_of(content):,} bytes")
    if lacking := front_matter.missing(fields):
        say(
            f"  note: the card names no {', no '.join(lacking)}; who knows them writes them between the "
            f"lines of --- of {folder / CARD}"
        )
    total = f"{len(files)} files, {sum(map(hub.size_of, files.values())):,} bytes"
    if push.dry_run:
        say("\n".join(f"  | {line}" for line in card.splitlines()))
        say(f"dry run: nothing was sent; {push.repo} would have {total}")
        return ""
    try:
        commit = hub.upload(push, files)
    except UserError as error:
        private = " --private" if push.private else ""
        reports = " ".join(["", "--reports", *push.reports]) if push.reports else ""
        raise UserError(
            f"{error}. {folder} is whole and proven, and nothing of it shows on the hub before all of it is "
            f"there. Run again: launch/merge.py --check {folder} --push-to-hub {push.repo}{private}{reports}"
        ) from None
    say(f"pushed {folder} to {push.repo} ({total}), commit {commit}")
    return commit
