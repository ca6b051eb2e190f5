"""Training data where there is none: pairs out of documents themselves (self_pairs.py), rows that models
write (generate.py).

write_self_pairs(config, print) -> output/train and output/test, dataset folders
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nemo_embed_core.config.synthesize import SynthesizeConfig
from nemo_embed_core.data.dataset import Metadata
from nemo_embed_core.data.dataset_writer import write_dataset
from nemo_embed_core.data.prepare import instruction
from nemo_embed_core.data.prompts import query_prompt
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.durable import new_folder
from nemo_embed_core.synthesize.documents import name_of, read_documents
from nemo_embed_core.synthesize.self_pairs import Split, self_pairs


def write_self_pairs(
    config: SynthesizeConfig, log: Callable[[str], None] = print
) -> dict[str, dict[str, int]]:
    """Both folders or none; the same documents and options give the same bytes. What was counted, by split.

    The corpus of a split is all of its chunks, those without a query too. UserError where a split, but for
    held_out=0, gets no pair.
    """
    source = name_of(config.documents)
    documents = read_documents(config.documents, log, config.max_documents, config.seed)
    splits = self_pairs(documents, config.self_pairs, config.seed)
    about = Metadata(
        corpus_id=source,
        query_instruction=instruction(query_prompt(config.task)),
        task_type="Retrieval",
        source=f"self-pairs of {source}",
        licence=config.licence,
    )
    found: dict[str, dict[str, int]] = {}
    with new_folder(Path(config.output)) as tmp:
        for name, split in zip(("train", "test"), splits, strict=True):
            if name == "test" and config.self_pairs.held_out == 0:
                continue
            _check(name, split, config)
            corpus = ((chunk.id, chunk.text) for chunk in split.chunks)
            found[name] = dict(split.counts) | write_dataset(tmp / name, split.rows_of(), about, corpus)
            counts = ", ".join(f"{number:,} {what}" for what, number in found[name].items() if number)
            log(f"{Path(config.output) / name}: {counts}")
    return found


def _check(name: str, split: Split, config: SynthesizeConfig) -> None:
    if not split.rows:
        more = "; raise self_pairs.held_out, or set it to 0" if name == "test" else ""
        raise UserError(
            f"documents: the {split.counts['files']} files for {name} in {config.documents} give no pair of "
            f"{', '.join(config.self_pairs.ways)}{more}"
        )
