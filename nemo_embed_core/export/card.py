"""README.md of an export, of facts in the sources' own files; an unknown fact is not written."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from nemo_embed_core.checkpoint.manifest import read_manifest
from nemo_embed_core.checkpoint.runs import find_checkpoint, is_checkpoint
from nemo_embed_core.checkpoint.source import Usage
from nemo_embed_core.checkpoint.weights import Weights
from nemo_embed_core.config import ModelConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.export import front_matter
from nemo_embed_core.export.formats import CONSUMERS, FORMATS, PLACE, Answer, Format
from nemo_embed_core.files.strict_json import read_object
from nemo_embed_core.model.spec import POOLINGS, family_of
from nemo_embed_core.version import code_version

_CAUSAL = (
    "Its attention is causal, as config.json says: a token sees those before it alone. Take transformers 5;",
    "older versions know neither Ministral 3 nor tokenizers of the class TokenizersBackend.",
)


class Card(TypedDict, total=False):
    """What the model card says; whatever is not given is not written."""

    title: str
    base_model: str  # hub id, or name or folder of the weights that training started from
    ancestors: list[str]  # runs of ours between the base model and the parents, the youngest first
    parents: list[str]  # the run that these weights are from, or the runs and folders that were averaged
    method: str  # how several parents became one
    # Sentences: what was chosen about prompts, lengths and the tokenizer, as the merge said it.
    choices: list[str]
    license: str  # an identifier of the Hugging Face hub, e.g. "apache-2.0"
    license_files: dict[str, bytes]  # of the base model, copied beside the weights
    runs: list[dict[str, Any]]  # one row of facts per run, e.g. {"run", "step", "rows", "data digest"}
    datasets: list[dict[str, Any]]  # one row of facts per source, e.g. {"name", "rows", "digest"}
    recipe: dict[str, Any]  # options of the run, nested or flat
    metrics: dict[str, dict[str, float]]  # {evaluation: {metric: value}}
    command: str
    commit: str  # of the code that trained
    exported_with: str  # version and commit of the code that wrote the folder


# ------------------------------------------------------------------------------------------ facts


def describe(sources: Sequence[Weights], report: Mapping[str, Any] | None = None) -> Card:
    """What the sources say of themselves: manifests, and data stores and base models where these still lie.

    report: of merge/stream.py's write_weights (method, weights, t).
    """
    manifests = {s.name: s.reader.manifest for s in sources if s.reader.manifest is not None}
    configs = [manifest["config"] for manifest in manifests.values()]
    origins = [_origin(s) for s in sources]
    card: Card = {"parents": [source.name for source in sources], "exported_with": code_version()}
    if report is not None and len(sources) > 1:
        card["method"] = {
            "mean": "Average",
            "weighted": f"Weighted average ({', '.join(map(str, report.get('weights', [])))})",
            "slerp": f"Spherical interpolation (t = {report.get('t')})",
        }[report["method"]]
    if ancestors := list(dict.fromkeys(name for origin in origins for name in origin[0])):
        card["ancestors"] = ancestors
    bases = {origin[1] for origin in origins}
    if len(bases) == 1 and (base := bases.pop()) is not None:
        card |= _base(base)
        if not manifests and card["base_model"] == base.absolute().name:
            # A Hugging Face folder is a parent; what it was trained from, it has not said.
            del card["base_model"]
    if manifests:
        card["runs"] = [_run(name, manifest) for name, manifest in manifests.items()]
        card["datasets"] = _datasets(manifests.values())
        card["recipe"] = _recipe(configs)
        commits = {m.get("commit") for m in manifests.values()}
        if len(commits) == 1 and (commit := commits.pop()):
            card["commit"] = commit
    return card


def _origin(source: Weights) -> tuple[list[str], Path | None]:
    """(runs of ours before this one, the folder that the first of them started from, None: none known)."""
    manifest = source.reader.manifest
    if manifest is None:
        return [], source.folder
    names: list[str] = []
    init_from = manifest["config"]["init_from"]
    while init_from and is_checkpoint(folder := Path(init_from)) and len(names) < 100:
        try:
            manifest = read_manifest(find_checkpoint(folder))
        except UserError:
            # An ancestor that is damaged or too old tells nothing, and is no reason not to export.
            return names, None
        names.append(folder.name)
        init_from = manifest["config"]["init_from"]
    return names, Path(init_from) if init_from else None


def _base(folder: Path) -> Card:
    """Name, licence and licence files of a Hugging Face folder; of one that is gone the name alone."""
    cached = re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", folder.parent.parent.name)
    front = _front_matter(folder / "README.md")
    card: Card = {"base_model": f"{cached[1]}/{cached[2]}" if cached else folder.absolute().name}
    # An export of ours, or another derivative, knows where it is from.
    if isinstance(front.get("base_model"), str):
        card["base_model"] = front["base_model"]
    # The weights stay under it; any other choice is the publisher's.
    if str(front.get("license")).startswith("llama"):
        card["license"] = str(front["license"])
    if folder.is_dir():
        names = re.compile(r"(licen[cs]e|notice|use_policy)[\w-]*(\.txt|\.md|\.pdf)?", re.IGNORECASE)
        found = [f for f in sorted(folder.iterdir()) if f.is_file() and names.fullmatch(f.name)]
        if found:
            card["license_files"] = {f.name: f.read_bytes() for f in found}
    return card


def _front_matter(readme: Path) -> dict[str, Any]:
    """Of anybody's card; {} where it says nothing that can be read."""
    try:
        text = readme.read_text(encoding="utf-8", errors="replace")
        return front_matter.read(text, readme)[0]
    except (OSError, UserError):
        return {}


def _run(name: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    steps = manifest["config"].get("steps")
    facts = {
        "run": name,
        "step": f"{manifest['step']} of {steps}" if steps else manifest["step"],
        "rows": manifest.get("num_rows"),
        "data digest": manifest["data_digest"],
        "ledger of samples": manifest["ledger"],
    }
    return {key: value for key, value in facts.items() if value is not None}


def _datasets(manifests: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per data set and task; its rows and sha256 when the compiled store is still there to be asked."""
    found: dict[str, dict[str, Any]] = {}
    for manifest in manifests:
        data = manifest["config"]["data"]
        store = Path(data.get("cache_dir", "")) / manifest["data_digest"][:32] / "manifest.json"
        try:
            compiled = read_object(store) if store.is_file() else {}
        except UserError:  # a damaged store tells nothing, and is no reason not to export
            compiled = {}
        sources = compiled.get("sources", []) if compiled.get("digest") == manifest["data_digest"] else []
        for i, dataset in enumerate(data["datasets"]):
            row = {"name": Path(dataset.get("path", "")).name, "task": dataset.get("task", "")}
            if dataset.get("document_task"):
                row["document task"] = dataset["document_task"]
            for side in ("query_max_length", "document_max_length"):
                if dataset.get(side):
                    row[side.replace("_", " ")] = dataset[side]
            if len(sources) == len(data["datasets"]):
                row |= {"rows": sources[i]["rows"], "sha256": ", ".join(sources[i]["files"].values())}
            found.setdefault(json.dumps(row), row)
    return list(found.values())


def _recipe(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The options that make a run what it is; where averaged runs differ, each run's value in their order."""
    keys = ("steps", "global_batch_size", "seed", "precision", "loss", "optim")
    data_keys = ("num_hard_negatives", "query_max_length", "document_max_length")
    flat = []
    for config in configs:
        options = {key: config[key] for key in keys if key in config}
        if config.get("lora", {}).get("rank"):
            options["lora"] = config["lora"]
        for name, default in (("init_layers", []), ("init_axes", "own")):
            if config.get(name, default) != default:
                options = {name: config[name], **options}
        flat.append(dict(_flat({**options, "data": {key: config["data"][key] for key in data_keys}})))
    recipe = {}
    for key in dict.fromkeys(key for options in flat for key in options):
        values = [options.get(key, "") for options in flat]
        is_one = all(value == values[0] for value in values)
        recipe[key] = values[0] if is_one else " / ".join(map(str, values))
    return recipe


def shown_command(argv: Sequence[str]) -> str:
    """A command line without this machine's folders: of absolute paths the last two parts."""
    program, *words = ["/".join(Path(word).parts[-2:]) if Path(word).is_absolute() else word for word in argv]
    return f"{program} {shlex.join(words)}".strip()  # the program as it is: "nemo-embed merge" is two words


# ------------------------------------------------------------------------------------------ text


def model_card(model: ModelConfig, dtype: str, usage: Usage, card: Card, format: Format = "native") -> str:
    """README.md: what is known, in the hub's front matter and in words. No figure that was not handed in."""
    import yaml

    base, words = card.get("base_model", ""), family_of(model).words
    kind, mask = ("Causal", "with its") if model.is_causal else ("Bidirectional", "without its")
    title = card.get("title") or f"{kind} {words} text embedding model"
    parents = [Path(name).name if Path(name).is_absolute() else name for name in card.get("parents", [])]
    is_hub_id = bool(re.fullmatch(r"[\w.-]+/[\w.-]+", base)) and not Path(base).exists()
    front: dict[str, Any] = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction", "sentence-similarity"],
    }
    if "license" in card:
        front["license"] = card["license"]
    if is_hub_id:
        front["base_model"] = base

    heads = f"{model.num_attention_heads} query and {model.num_key_value_heads} key/value heads"
    shape = f"{model.num_hidden_layers} layers, hidden size {model.hidden_size}, {heads}, "
    shape += f"vocabulary {model.vocab_size}, {dtype}"
    method = card.get("method", "Average") if len(parents) > 1 else "Weights"
    says_llama = _why_llama(card)
    trained_here = " Trained with nemo_embed_core." if card.get("runs") else ""
    pooling = POOLINGS[model.pooling]
    computes = f"Text embeddings from a {words} {mask} causal mask: {pooling.words}"
    trust = ", trust_remote_code=True" if FORMATS[format].code else ""
    widths = ", ".join(map(str, sorted(usage.dims, reverse=True)))
    one_limit = f"- sentence-transformers has one limit for both and cuts at {usage.longest} tokens"
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        f"# {title}",
        "",
        *(["**Built with Llama.**", ""] if says_llama else []),
        *textwrap.wrap(f"{computes}, then L2 normalisation.{trained_here}", 112),
        "",
        f"- Shape: {shape}",
        *(f"- {line[0].upper()}{line[1:]}" for line in usage.lines(mark="`")),
        *([f"- Widths: trained for the first {widths} columns, normalised again"] if widths else []),
        *([one_limit] if usage.query_max_length != usage.document_max_length else []),
        *(f"- {line[0].upper()}{line[1:]}" for line in card.get("choices", [])),
        *([f"- Base model: {base if is_hub_id else Path(base).name}"] if base else []),
        *([f"- Earlier stages: {', '.join(card['ancestors'])}"] if card.get("ancestors") else []),
        *([f"- {method} of: {', '.join(parents)}"] if parents else []),
        "",
        "## Usage",
        "",
        *(_CAUSAL if model.is_causal else FORMATS[format].requirements),
        "",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        f'model = SentenceTransformer("{PLACE}"{trust})',
        'queries = model.encode(["how do plants turn light into sugar?"], prompt_name="query")',
        'documents = model.encode(["Photosynthesis stores the energy of light in glucose."], '
        'prompt_name="document")',
        "print(model.similarity(queries, documents))",
        "```",
        "",
        "With transformers alone:",
        "",
        "```python",
        "import torch",
        "from transformers import AutoModel, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{PLACE}")',
        f'model = AutoModel.from_pretrained("{PLACE}"{trust}).eval()',
        f"query_prompt, document_prompt = {usage.default.query!r}, {usage.default.document!r}",
        'texts = [query_prompt + "how do plants turn light into sugar?"]',
        f"batch = tokenizer(texts, padding=True, truncation=True, max_length={usage.longest}, "
        'return_tensors="pt")',
        "with torch.no_grad():",
        "    hidden = model(**batch).last_hidden_state.float()",
        'mask = batch["attention_mask"][..., None]',
        f"embeddings = torch.nn.functional.normalize({pooling.torch}, dim=-1)",
        "```",
    ]
    for heading, rows in (("Training runs", card.get("runs")), ("Training data", card.get("datasets"))):
        if rows:
            columns = list(dict.fromkeys(key for row in rows for key in row))
            lines += _table(heading, columns, [[row.get(c, "") for c in columns] for row in rows])
    if card.get("recipe"):
        lines += _table("Recipe", ["option", "value"], [[k, v] for k, v in _flat(card["recipe"])])
    if card.get("metrics"):
        metrics = card["metrics"].items()
        cells = [[name, metric, value] for name, values in metrics for metric, value in values.items()]
        lines += _table("Results", ["evaluation", "metric", "value"], cells)
    facts = {
        "trained with commit": card.get("commit"),
        "exported with": card.get("exported_with"),
        "exported by": card.get("command"),
    }
    if any(facts.values()):
        lines += ["", "## Provenance", ""]
        lines += [f"- {name}: `{fact}`" for name, fact in facts.items() if fact]
    if says_llama:
        does_not_begin = "" if title.startswith("Llama") else ' (does not begin with "Llama")'
        copies = ", ".join(sorted(card.get("license_files", {}))) or "missing, none lay beside the base model"
        lines += [
            "",
            "## Licence of the base model",
            "",
            f"{says_llama} Weights derived from Meta's Llama models stay under the licence of their version. "
            "Since Llama 3 it asks",
            "whoever distributes a derived model to pass on a copy of that licence and its notice, to show "
            '"Built with Llama"',
            'prominently, and to begin the name of the derived model with "Llama".',
            "",
            f"- Copy of the licence: {copies}",
            f"- Name of this model: {title}{does_not_begin}",
        ]
    return "\n".join(lines) + "\n"


def serving_section(answers: Sequence[Answer], usage: Usage) -> str:
    """Who was asked about the folder, what each said, the command to serve, and what differs there."""
    lines = ["", "## Serving", ""]
    for name, state, words in answers:
        consumer = CONSUMERS[name]
        lines.append(f"- {name}: {state}, {words}.")
        if state in ("refused", "wrong"):
            continue
        if consumer.command:
            lines.append(f"  `{_with_limit(consumer.command, usage)}`")
        if consumer.differs:
            lines.append(f"  What differs: {_with_limit(consumer.differs, usage)}.")
    if any(usage.default):
        query, document = usage.default
        lines += ["", f"Prompt before a query: {query!r}; before a document: {document!r}."]
    return "\n".join(lines) + "\n"


def _with_limit(text: str, usage: Usage) -> str:
    return text.replace("{limit}", str(usage.longest)).replace("{all}", str(4 * usage.longest))


def _why_llama(card: Card) -> str:
    """The fact that makes these weights a derivative of Meta's Llama, "": none; the shape alone is none."""
    names = [name.rsplit("/", 1)[-1] for name in (card.get("base_model", ""), *card.get("parents", []))]
    base = f"The base model, {names[0]}," if names[0] else "The base model"
    if card.get("license", "").startswith("llama"):
        return f"{base} is published under the licence `{card['license']}`."
    for file, content in card.get("license_files", {}).items():
        if re.search(rb"llama[\w. -]*community license", content, re.IGNORECASE):
            return f"{base} came with a Llama community licence ({file})."
    name = next((name for name in names if "llama" in name.lower()), "")
    return f"The base model, {name}, says Llama in its name." if name else ""


def _table(heading: str, header: list[str], rows: list[list[Any]]) -> list[str]:
    cells = [[str(cell).replace("|", "\\|").replace("\n", "\\n") for cell in row] for row in [header, *rows]]
    body = ["| " + " | ".join(row) + " |" for row in cells]
    return ["", f"## {heading}", "", body[0], "|" + " --- |" * len(header), *body[1:]]


def _flat(options: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """{"optim": {"lr": 1}} -> [("optim.lr", 1)]"""
    flat: list[tuple[str, Any]] = []
    for key, value in options.items():
        flat += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(prefix + key, value)]
    return flat
