"""What stands before the texts of a task of mteb: the paper's instruction, or a prompt of the model's own."""

from __future__ import annotations

from typing import Any

from nemo_embed_core.checkpoint.source import Usage

# Both texts of these have one instruction in the paper and its published model, whatever the task says.
SAME_ON_BOTH_SIDES = {
    "STS": "Retrieve semantically similar text",
    "PairClassification": "Retrieve semantically similar text",
    "BitextMining": "Retrieve parallel sentences",
}


def is_instructed(usage: Usage) -> bool:
    """Whether its queries have the paper's prompt with some instruction."""
    query = usage.default.query
    return query.startswith("Instruct: ") and query.endswith("\nQuery: ")


def instruction_of_type(task_type: str) -> str:
    """The paper's for a local task of this type; "" where it depends on the task."""
    words = {"sts": "STS", "pair_classification": "PairClassification", "bitext": "BitextMining"}
    return SAME_ON_BOTH_SIDES.get(words.get(task_type, ""), "")


def paper_instruction(metadata: Any, side: str | None) -> str:
    """As the published model's, which mteb has with its instructions for tasks: documents have none."""
    from mteb.abstasks.abstask import get_abstask_prompt
    from mteb.models.model_implementations.nvidia_models import TASK_PROMPTS

    own = TASK_PROMPTS.get(metadata.name)
    is_search = "Retrieval" in metadata.type or "Reranking" in metadata.type
    if metadata.type in SAME_ON_BOTH_SIDES:
        return SAME_ON_BOTH_SIDES[metadata.type]
    if is_search and side == "document" and not isinstance(own, dict):
        return ""
    own = own or metadata.prompt
    if isinstance(own, dict):
        return own.get(side) or ""
    return own or get_abstask_prompt(metadata.name)


def own_prompt(usage: Usage, metadata: Any, side: str | None) -> str:
    """As mteb chooses among a model's: of the task, else of its type, else of the side; "" without."""
    from mteb.models.abs_encoder import get_prompt_name
    from mteb.types import PromptType

    named = usage.named_prompts()
    name = get_prompt_name(named, metadata, PromptType(side) if side else None)
    return named.get(name, "") if name else ""
