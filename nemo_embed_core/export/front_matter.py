"""The YAML between two lines of --- at the head of a model card, which the hub and mteb read.

    read(text, where)                    -> (its fields, what follows)
    published(text, repo, results, where)    the card under its name on the hub

What only a publisher knows (license, language, datasets) is written there by hand and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_embed_core.errors import UserError
from nemo_embed_core.export.formats import PLACE

# Whoever looks for a model on the hub filters by these; mteb's leaderboard shows the first two.
WANTED = ("license", "language", "base_model")


def read(text: str, where: Path) -> tuple[dict[str, Any], str]:
    """UserError for a card without them, or with YAML that is damaged."""
    import yaml

    parts = text.split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        raise UserError(f"{where} has no fields between two lines of --- at its head")
    try:
        fields = yaml.safe_load(parts[1]) or {}
    except yaml.YAMLError as error:
        raise UserError(
            f"{where}: the fields at its head are no YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(fields, dict):
        raise UserError(
            f"{where}: the fields at its head are a {type(fields).__name__}, not names with values"
        )
    return fields, parts[2]


def published(text: str, repo: str, results: Sequence[Any], where: Path) -> tuple[str, dict[str, Any]]:
    """(the card with its own name and these results, its fields).

    results: of huggingface_hub.EvalResult; they take the place of those that the card had.
    """
    import yaml

    fields, body = read(text, where)
    if results:
        from huggingface_hub.repocard_data import eval_results_to_model_index

        fields["model-index"] = eval_results_to_model_index(repo, list(results))
        fields["tags"] = list(dict.fromkeys([*(fields.get("tags") or []), "mteb"]))
    head = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n{body.replace(PLACE, repo)}", fields


def missing(fields: dict[str, Any]) -> list[str]:
    return [name for name in WANTED if not fields.get(name)]
