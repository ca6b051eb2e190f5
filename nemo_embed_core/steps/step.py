"""A step: one launcher with checked options, known by a digest of them and of what it reads.

    step = made("train", VERBS["train"], options, needs, read)        # needs: steps whose products it reads

Two steps with the same options, inputs and needs are the same step: it runs once, and what it has made stays
as long as nothing of these changes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_embed_core import __version__
from nemo_embed_core.files.durable import sha256_file, sha256_folder
from nemo_embed_core.steps.verbs import HERE, Verb


@dataclass(frozen=True)
class Step:
    """name: of its folder; options: checked and whole, paths of other steps with HERE before them.
    inputs: what it reads that no step makes."""

    name: str
    verb: Verb
    options: dict[str, Any]
    needs: tuple[Step, ...]
    inputs: tuple[str, ...]
    digest: str

    @property
    def folder(self) -> str:
        return f"{HERE}steps/{self.name}-{self.digest[:12]}"

    @property
    def product(self) -> str:
        return f"{self.folder}/{self.verb.product}"


def made(
    name: str, verb: Verb, options: dict[str, Any], needs: Sequence[Step], read: Mapping[str, str]
) -> Step:
    """read: {path: digest} of its inputs."""
    content = json.dumps([name, options, [n.digest for n in needs], read, __version__], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()
    return Step(name, verb, options, tuple(needs), tuple(read), digest)


def digest_of(path: str) -> str:
    """Of a file's bytes, or of all in a folder."""
    place = Path(path)
    return sha256_folder(place) if place.is_dir() else sha256_file(place)


def closure(steps: Iterable[Step]) -> dict[str, Step]:
    """These and all that they need, by digest."""
    found, queue = dict[str, Step](), list(steps)
    while queue:
        step = queue.pop()
        if found.setdefault(step.digest, step) is step:
            queue += step.needs
    return found
