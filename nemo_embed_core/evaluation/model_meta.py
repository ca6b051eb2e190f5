"""What mteb and the hub are told of an export: mteb's ModelMeta of it as a file, and its scores.

    (folder / "model_meta.json").write_bytes(model_meta(folder, "user/name", fields))
    ModelMeta.model_validate_json_resolved((folder / "model_meta.json").read_bytes()).load_model()

The loader is mteb's own. A model that was trained with instructions gets for each of mteb's tasks the prompts
of `--instructions auto`, any other those that mteb chooses among the model's; so that mteb's scores are ours.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from nemo_embed_core.checkpoint.hf_folder import open_folder
from nemo_embed_core.checkpoint.source import Usage, usage_of_folder
from nemo_embed_core.checkpoint.weights import open_weights
from nemo_embed_core.data.prompts import query_prompt
from nemo_embed_core.data.tokenizer import load_tokenizer
from nemo_embed_core.encoders.embedder import digest_of
from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation.encoding import say
from nemo_embed_core.evaluation.hub_data import parts_of
from nemo_embed_core.evaluation.instructions import SAME_ON_BOTH_SIDES, is_instructed, paper_instruction
from nemo_embed_core.evaluation.results import reports_in
from nemo_embed_core.evaluation.retrieval import mteb_imported, task_metadata
from nemo_embed_core.files.strict_json import read_object
from nemo_embed_core.model.spec import hf_shapes

FILE = "model_meta.json"  # as mteb calls it in folders of results
SIDES = ("query", "document")


# ------------------------------------------------------------------------------------------ the model


def model_meta(folder: Path, repo: str, fields: Mapping[str, Any]) -> bytes:
    """mteb's ModelMeta of an export, as JSON that its model_validate_json_resolved() loads.

    repo: USER/NAME on the hub.  fields: of the card's head; license, language, base_model and datasets are
    the publisher's to say, and None where they are not there.
    """
    model, usage = open_folder(folder).model, usage_of_folder(folder)
    config, shapes = read_object(folder / "config.json"), hf_shapes(model)
    size = sum(math.prod(shape) for shape in shapes.values())
    columns = sorted({*usage.dims, model.hidden_size})
    address = f"https://huggingface.co/{repo}"
    with mteb_imported():
        from mteb.languages.iso_mappings import _hf_langs_to_iso_lang_scripts
        from mteb.models import ModelMeta

        loader, options = _loader(usage)
        meta = ModelMeta(
            loader=loader,
            loader_kwargs={**options, **({"trust_remote_code": True} if "auto_map" in config else {})},
            name=repo,
            revision=None,  # of a commit that this file is part of: mteb takes the newest
            release_date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            languages=_hf_langs_to_iso_lang_scripts(fields.get("language")),
            n_parameters=size,
            n_embedding_parameters=model.vocab_size * model.hidden_size,
            memory_usage_mb=round(size * {"float32": 4}.get(config["dtype"], 2) / 1024**2),
            max_tokens=usage.longest,
            embed_dim=columns if len(columns) > 1 else model.hidden_size,
            license=_license(folder, address, fields),
            open_weights=True,
            public_training_code=None,
            public_training_data=None,
            framework=_frameworks(folder),
            reference=address,
            similarity_fn_name=usage.similarity if usage.similarity in ("cosine", "dot") else None,
            use_instructions=any(usage.default),
            training_datasets=_training_datasets(fields.get("datasets")),
            adapted_from=fields.get("base_model") if isinstance(fields.get("base_model"), str) else None,
            output_dtypes=config["dtype"],
        )
        value = meta.model_dump(mode="json", exclude={"loader"})
    if meta.training_datasets is not None:
        value["training_datasets"] = sorted(meta.training_datasets)
    text = json.dumps({"loader": loader.__name__, **value}, indent=1, ensure_ascii=False)
    return f"{text}\n".encode()


def _loader(usage: Usage) -> tuple[Any, dict[str, Any]]:
    """(mteb's class that encodes as we do, its options)."""
    from mteb.models import SentenceTransformerEncoderWrapper
    from mteb.models.instruct_wrapper import InstructSentenceTransformerModel

    if not is_instructed(usage):
        return SentenceTransformerEncoderWrapper, {}
    template = query_prompt("{instruction}")
    prompts = prompts_of_tasks(InstructSentenceTransformerModel, template)
    return InstructSentenceTransformerModel, {"instruction_template": template, "prompts_dict": prompts}


def prompts_of_tasks(wrapper: Any, template: str) -> dict[str, Any]:
    """{task or type: instruction, or one of each side}: of types that have one, and of each task for which
    mteb's wrapper would take another one than the paper's."""
    import mteb
    from mteb.types import PromptType

    stub = wrapper.__new__(wrapper)  # its prompts alone are asked
    stub.instruction_template, stub.prompts_dict = template, dict(SAME_ON_BOTH_SIDES)

    def theirs(metadata: Any, side: str | None) -> str:
        own = metadata.prompt
        if side and isinstance(own, dict) and not own.get(side):
            return ""  # which it gives too, with a warning for each task
        return stub.get_instruction(metadata, PromptType(side) if side else None)

    prompts: dict[str, Any] = dict(SAME_ON_BOTH_SIDES)
    for task in mteb.get_tasks(modalities=["text"], exclusive_modality_filter=True):
        if list(parts_of(task)) != [task]:  # it asks its parts, which are tasks themselves
            continue
        metadata = task.metadata
        is_search = "Retrieval" in metadata.type or "Reranking" in metadata.type
        ours = {side: paper_instruction(metadata, side) for side in (SIDES if is_search else (None,))}
        if ours != {side: theirs(metadata, side) for side in ours}:
            prompts[metadata.name] = ours if is_search else ours[None]
    return prompts


def _license(folder: Path, address: str, fields: Mapping[str, Any]) -> str | None:
    """As mteb knows it, else an address: of the card's own or of the file that lies beside the weights."""
    from mteb.types import Licenses

    name = str(fields.get("license") or "").lower()
    known = {entry for part in get_args(Licenses) for entry in (get_args(part) or (part,))} | {
        *get_args(Licenses)
    }
    if name in known:
        return name
    if str(fields.get("license_link", "")).startswith("https://"):
        return str(fields["license_link"])
    files = [
        file.name for file in sorted(folder.iterdir()) if file.name.lower().startswith(("license", "licence"))
    ]
    return f"{address}/blob/main/{files[0]}" if files else None


def _frameworks(folder: Path) -> list[Any]:
    files = {"ONNX": "onnx/model.onnx", "GGUF": "model.gguf"}
    found = [name for name, file in files.items() if (folder / file).is_file()]
    return ["Sentence Transformers", "PyTorch", "Transformers", "safetensors", *found]


def _training_datasets(names: Any) -> set[str] | None:
    """mteb's names of the tasks whose data the card's `datasets` has, by task or by data set on the hub; None
    where the card names none: not known."""
    import mteb

    if not names:
        return None
    given = {names} if isinstance(names, str) else set(names)
    every = [task.metadata for task in mteb.get_tasks()]
    return {m.name for m in every if m.name in given or (m.dataset or {}).get("path") in given}


# ------------------------------------------------------------------------------------------ its scores


def results_of(folder: Path, paths: Collection[str]) -> list[Any]:
    """A huggingface_hub.EvalResult of each split and subset of each task in reports of launch/evaluate.py.

    UserError for a report without a model of these weights: another's scores would stand on the card.
    """
    from huggingface_hub import EvalResult

    digests: dict[str, str] = {}
    found: list[Any] = []
    for path, report in reports_in(list(paths), say):
        entries = [
            entry
            for entry in report.values()
            if entry.get("digest")
            and entry["digest"] == digests.setdefault(entry["precision"], _digest(folder, entry["precision"]))
        ]
        if not entries:
            raise UserError(
                f"{path}: none of {', '.join(report)} has the weights of {folder}; evaluate that folder "
                "itself, with all its columns: launch/evaluate.py --models "
                f"{folder} --output REPORT"
            )
        with mteb_imported():
            found += [EvalResult(**row) for entry in entries for row in _rows(entry)]
    return found


def _digest(folder: Path, precision: str) -> str:
    weights, tokenizer = open_weights(folder), load_tokenizer(folder)
    return digest_of(weights, tokenizer, precision)


def _rows(entry: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
    """As mteb's TaskResult.get_hf_eval_results() says its own; of a local task the score under its name."""
    facts, main = entry["data"], entry["data"]["main_score"]
    metric = {"metric_type": main, "metric_name": main}
    if "scores" not in entry:
        return [
            {
                **{"task_type": task_metadata(facts["type"], main)._hf_task_type()[0]},
                **{"task_name": facts["type"], "dataset_type": facts["name"], "dataset_name": facts["name"]},
                **{"dataset_split": facts["split"], "dataset_revision": facts["digest"]},
                **{**metric, "metric_value": entry[main]},
            }
        ]
    import mteb

    metadata = mteb.get_task(facts["name"]).metadata
    of_task = {"task_type": metadata._hf_task_type()[0], "task_name": metadata.type}
    source = {"source_name": "MTEB", "source_url": "https://github.com/embeddings-benchmark/mteb/"}
    return [
        {
            **of_task,
            **{"dataset_type": metadata.dataset["path"], "dataset_name": f"{metadata.name} ({subset})"},
            **{"dataset_config": subset, "dataset_split": split},
            **{"dataset_revision": metadata.dataset["revision"]},
            **{**metric, "metric_value": value, **source},
        }
        for split, each in entry["scores"].items()
        for subset, value in each.items()
    ]
