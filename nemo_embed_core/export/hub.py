"""A folder onto the Hugging Face hub in one commit: all of its files are there afterwards, or none is.

    push = Push.of("user/name", private=True)    UserError for a malformed name; asks nobody
    check_login(push)                            before the work that makes the folder
    upload(push, files)                          {name: file, or bytes that stand for one}

The token is that of `hf auth login` or of HF_TOKEN, found by huggingface_hub; no option takes it and no line
shows it. No import of huggingface_hub before it is used: the launcher makes a Push for --help alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nemo_embed_core.errors import UserError

Files = Mapping[str, Path | bytes]
# What the hub itself writes into a new repository, and nobody loads.
THEIRS = frozenset({".gitattributes"})
SHOWN = 5  # names of files in an error
T = TypeVar("T")


@dataclass(frozen=True)
class Push:
    """repo: USER/NAME.  private: of a repository that is made.  dry_run: says what it would do, offline.

    reports: files of launch/evaluate.py about the folder, whose scores the card repeats.
    """

    repo: str
    private: bool = False
    dry_run: bool = False
    reports: Sequence[str] = ()

    @classmethod
    def of(
        cls, repo: str | None, private: bool = False, dry_run: bool = False, reports: Sequence[str] = ()
    ) -> Push | None:
        """Of a command line; None where nothing of it was given."""
        if repo is None:
            if private or dry_run or reports:
                raise UserError("--private, --dry-run and --reports go with --push-to-hub USER/NAME")
            return None
        part = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?"
        is_name = re.fullmatch(f"{part}/{part}", repo, re.ASCII) and not re.search(r"--|\.\.|\.git$", repo)
        if not is_name or len(repo) > 96:
            raise UserError(
                f"--push-to-hub {repo}: a name on the hub is USER/NAME, of at most 96 letters, digits, '-', "
                "'_' and '.', none of '-' and '.' twice or at an end, and not .git at the end"
            )
        return cls(repo, private, dry_run, tuple(reports))


def files_of(folder: Path) -> dict[str, Path]:
    """{name in the repository: file} of all that lies in it; UserError for what no export has."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    for name, path in found.items():
        if path.is_symlink() or any(part.startswith(".") for part in name.split("/")):
            what = "a link" if path.is_symlink() else "hidden"
            raise UserError(f"{path} is {what}, which no export has: move it out, or it would be published")
    return {name: path for name, path in found.items() if path.is_file()}


def size_of(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


# ------------------------------------------------------------------------------------------ asked


def check_login(push: Push) -> None:
    """UserError unless the hub knows the token; of an existing repository, unless --private fits it."""
    _existing(push)


def _existing(push: Push) -> Any:
    """The hub's entry of the repository, None where there is none."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"--push-to-hub {push.repo} needs the network: unset HF_HUB_OFFLINE")
    if not get_token():
        raise UserError(
            f"--push-to-hub {push.repo} needs a token with write access: run `hf auth login`, or set HF_TOKEN"
        )
    _asked(push, "the login", HfApi().whoami)
    try:
        info = _asked(push, "the repository", lambda: HfApi().model_info(push.repo), RepositoryNotFoundError)
    except RepositoryNotFoundError:
        return None
    if push.private and not info.private:
        raise UserError(
            f"--private: {push.repo} is public, which a push does not change; change it in its settings, or "
            "push to another name"
        )
    return info


def _asked(push: Push, what: str, call: Callable[[], T], *passed: type[Exception]) -> T:
    """call(), whose error becomes a UserError without token and addresses; `passed` go on as they are."""
    from huggingface_hub import constants, get_token

    try:
        return call()
    except passed:
        raise
    except Exception as error:  # of the network, the library, the hub
        code = getattr(getattr(error, "response", None), "status_code", None)
        own = getattr(error, "server_message", None)  # else a page about statuses of HTTP
        said = " ".join(str(own or error.__cause__ or error).split())
        said = re.sub(r"\?\S*", "", said.replace(get_token() or "\0", "***"))[:200]
        reason = {
            401: "the hub does not know the token: run `hf auth login`, or set HF_TOKEN",
            403: f"the token may not write there: take one with write access to {push.repo.split('/')[0]}",
        }.get(code or 0, f"{type(error).__name__} {code or ''}: {said}")
        raise UserError(f"{push.repo} at {constants.ENDPOINT}, {what}: {reason}") from None


# ------------------------------------------------------------------------------------------ sent


def upload(push: Push, files: Files) -> str:
    """The commit's id; the repository is made where there is none. UserError where it holds other files.

    What the hub says afterwards of every file, size and hash, is compared with ours.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api, info = HfApi(), _existing(push)
    others = sorted({s.rfilename for s in (info.siblings or ())} - set(files) - THEIRS) if info else []
    if others:
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        raise UserError(
            f"{push.repo} has files that this folder has not, which would stay beside it: "
            f"{', '.join(others[:SHOWN])}{more}; delete them there, or push to another name"
        )
    if info is None:
        private = push.private or None  # else as the owner's settings say
        _asked(push, "making it", lambda: api.create_repo(push.repo, private=private, exist_ok=True))
    sent = [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in files.items()
    ]
    commit = _asked(
        push,
        "sending the files",
        lambda: api.create_commit(
            push.repo,
            sent,
            commit_message="Upload by nemo_embed_core",
            # Whoever changed it since it was looked at is not overwritten.
            parent_commit=info.sha if info else None,
        ),
    )
    there = _asked(
        push, "reading it back", lambda: api.model_info(push.repo, revision=commit.oid, files_metadata=True)
    )
    found = {s.rfilename: s for s in there.siblings or ()}
    for operation in sent:
        name, entry = operation.path_in_repo, found.get(operation.path_in_repo)
        if entry is None or not _is_same(operation, files[name], entry):
            raise UserError(f"{push.repo} at {commit.oid}: its {name} is not ours; push again")
    return str(commit.oid)


def _is_same(sent: Any, content: Path | bytes, entry: Any) -> bool:
    if entry.size != size_of(content):
        return False
    if entry.lfs is not None:
        return bool(entry.lfs.sha256 == sent.upload_info.sha256.hex())
    data = content if isinstance(content, bytes) else content.read_bytes()
    blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False)  # as git names it
    return bool(entry.blob_id == blob.hexdigest())
