"""Data sets of the Hugging Face hub: hf://user/name[/subset][@revision][:split], streamed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from nemo_embed_core.data.columnar import one_line
from nemo_embed_core.errors import UserError

_NAME = r"[\w.-]+"
_ADDRESS = re.compile(rf"hf://(?:datasets/)?({_NAME}/{_NAME})(?:/({_NAME}))?(?:@([\w./-]+))?(?::({_NAME}))?")


class Hub(NamedTuple):
    """hf://user/name[/subset][@revision][:split]"""

    name: str
    subset: str | None
    revision: str | None
    split: str


def hub_address(path: str, split: str) -> Hub:
    found = _ADDRESS.fullmatch(path)
    if not found:
        raise UserError(f"{path}: write hf://user/name[/subset][@revision][:split]")
    return Hub(found[1], found[2], found[3], found[4] or split)


def hub_commit(hub: Hub) -> str:
    """The commit of the data set on the hub, which is what a store was made of."""
    if re.fullmatch(r"[0-9a-f]{40}", hub.revision or ""):
        return str(hub.revision)
    try:
        import huggingface_hub

        return str(huggingface_hub.HfApi().dataset_info(hub.name, revision=hub.revision).sha)
    except Exception as error:  # of the network, the library, the hub
        fix = "name the commit, @ and 40 letters, or check the name and the network"
        raise UserError(f"hf://{hub.name}: its commit is not known ({one_line(error)}): {fix}") from None


def hub_rows(path: str, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row from 1, fields) as the datasets library streams them; the files stay where they are."""
    hub, line = hub_address(path, split), 0
    try:
        import datasets
    except ImportError:
        raise UserError(f"{path} needs the datasets library: pip install datasets") from None
    if int(datasets.__version__.split(".")[0]) < 4:
        raise UserError(f"datasets {datasets.__version__} can run code of others: pip install -U datasets")
    commit = hub_commit(hub)
    try:
        rows = datasets.load_dataset(hub.name, hub.subset, split=hub.split, revision=commit, streaming=True)
        for fields in rows:
            line += 1
            yield line, dict(fields)
    except Exception as error:  # of the network, the library, the hub's files
        raise UserError(f"{path} cannot be read behind row {line}: {one_line(error)}") from None
