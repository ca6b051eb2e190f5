"""What was asked and answered, in one file that only grows: nothing that was paid for is asked again.

output/journal.jsonl, an event a line, of a request by the digest of all that was sent. No number of the plan
is in it: the same request is the same one wherever another plan, of more documents say, has it.

{"digest", "event": "sent", "worst"}            before it is sent: what it can cost at most
{"digest", "event": "refused", "why"}           no answer and no cost: 429, 503, no connection
{"digest", "event": "lost", "why"}              no answer, perhaps paid: timed out, cut, 500; costs `worst`
{"digest", "event": "reply", "model", "body", "sha256", "tokens": [in, out], "cost"}

A reply is fsynced before it counts. After a kill at any point a request that was sent and has no other event
counts as `worst`, so that a budget holds over any number of kills; it is sent again with the same
Idempotency-Key, and servers that know that header answer it from their memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_embed_core.errors import DataError, failpoint
from nemo_embed_core.files.durable import fsync, make_folder
from nemo_embed_core.files.strict_json import parse


@dataclass(frozen=True)
class Reply:
    """body: the raw response."""

    model: str
    body: str
    tokens: tuple[int, int]  # of the prompt, of the answer
    cost: float


class Journal:
    """Memory: some 200 bytes a request; bodies stay in the file."""

    def __init__(self, path: Path, log: Callable[[str], None] = print):
        self.path, self.spent, self.tokens = path, 0.0, [0, 0]
        self._where: dict[str, int] = {}  # digest -> where its reply's line begins
        self._open: dict[str, list[float]] = {}  # digest -> costs of what was sent and has no outcome
        make_folder(path.parent)
        self._file = path.open("ab+")
        self._read(log)
        fsync(path.parent)

    def _read(self, log: Callable[[str], None]) -> None:
        self._file.seek(0)
        at = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):  # the process was killed while it wrote
                log(f"{self.path}: the last line is cut, and is left out")
                self._file.truncate(at)
                break
            try:
                self._take(parse(line), at)
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    self.path, number, f"is damaged ({type(error).__name__}: {error}): restore the file, or "
                    "delete this line to ask again"
                ) from None  # fmt: skip
            at += len(line)

    def _take(self, event: dict[str, Any], at: int) -> None:
        digest, kind = event["digest"], event["event"]
        if kind == "sent":
            self._open.setdefault(digest, []).append(event["worst"])
            self.spent += event["worst"]
            return
        if kind not in ("refused", "lost", "reply"):
            raise ValueError(f"the event {kind!r} is not known")
        worst = self._open[digest].pop()
        if not self._open[digest]:
            del self._open[digest]
        if kind == "refused":
            self.spent -= worst
        if kind == "reply":
            if hashlib.sha256(event["body"].encode()).hexdigest() != event["sha256"]:
                raise ValueError("the body does not have its sha256")
            self.spent += event["cost"] - worst
            self.tokens = [a + b for a, b in zip(self.tokens, event["tokens"], strict=True)]
            self._where[digest] = at

    def _append(self, event: dict[str, Any], durable: bool) -> None:
        line = (json.dumps(event, ensure_ascii=False) + "\n").encode()
        self._file.seek(0, 2)
        at = self._file.tell()
        self._file.write(line)
        self._file.flush()
        if durable:
            fsync(self._file.fileno())
        self._take(event, at)
        failpoint(f"journal.{event['event']}", event["digest"])

    def sent(self, digest: str, worst: float) -> None:
        """`spent` has it at once: it is what can have been paid."""
        self._append({"digest": digest, "event": "sent", "worst": worst}, durable=False)

    def refused(self, digest: str, why: str) -> None:
        self._append({"digest": digest, "event": "refused", "why": why}, durable=False)

    def lost(self, digest: str, why: str) -> None:
        self._append({"digest": digest, "event": "lost", "why": why}, durable=False)

    def reply(self, digest: str, reply: Reply) -> None:
        event = {"digest": digest, "event": "reply", "model": reply.model, "body": reply.body}
        event |= {"sha256": hashlib.sha256(reply.body.encode()).hexdigest()}
        self._append(event | {"tokens": list(reply.tokens), "cost": reply.cost}, durable=True)

    def has(self, digest: str) -> bool:
        """Whether this very request was answered."""
        return digest in self._where

    def get(self, digest: str) -> Reply:
        self._file.seek(self._where[digest])
        event = parse(self._file.readline())
        return Reply(event["model"], event["body"], tuple(event["tokens"]), event["cost"])

    def __len__(self) -> int:
        return len(self._where)

    def close(self) -> None:
        self._file.close()
