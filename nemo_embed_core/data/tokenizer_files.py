"""tokenizer.json is the only truth about a tokenizer: files of an export that say so, and when two agree.

What a reader could take from elsewhere is not written or says the same: a tokenizer_class that rebuilds the
pipeline by its own rules (LlamaTokenizer), add_bos_token and add_eos_token (transformers 4 appends the token,
5 does not), legacy, added_tokens_decoder, other special tokens, sides of truncation and padding, both also
inside tokenizer.json, a chat template, and a tokenizer.model beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer

from nemo_embed_core.errors import UserError
from nemo_embed_core.files.strict_json import parse

# Load tokenizer.json as it is: the first in transformers 4 and 5; the second in 5 alone, which 4 refuses.
FAITHFUL_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


def check_servable(files: Mapping[str, bytes]) -> list[str]:
    """UserError for a tokenizer that no export could hand on; else what its config asks for in vain.

    files: tokenizer.json and tokenizer_config.json. For the start of a run: later it would be found when the
    model is merged.
    """
    export_files(files, max_length=512)
    config = _config(files)
    tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
    before, after = added_ids(tokenizer)
    bos, eos = (tokenizer.token_to_id(_content(config.get(key)) or "") for key in ("bos_token", "eos_token"))
    does = {
        "add_bos_token": bool(before) and before[0] == bos,
        "add_eos_token": bool(after) and after[-1] == eos,
        "truncation_side": "right",
        "do_lower_case": False,
    }
    differ = [key for key, value in does.items() if config.get(key, value) != value]
    vain = [f"{key}: {json.dumps(config[key])}" for key in differ]
    given = config.get("tokenizer_class") or FAITHFUL_CLASSES[0]
    if given not in FAITHFUL_CLASSES:
        vain.append(f"tokenizer_class: {json.dumps(given)}")
    extra = [_content(t) for t in (config.get("added_tokens_decoder") or {}).values()]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = config.get(key) or []
        extra += [_content(t) for t in (tokens.values() if isinstance(tokens, dict) else tokens)]
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    unknown = [t for t in dict.fromkeys(extra) if t is not None and t not in vocabulary]
    vain += [f"special token {json.dumps(t)}" for t in unknown]
    if not vain:
        return []
    return [
        f"tokenizer_config.json says {', '.join(vain)}, which is not in tokenizer.json: texts are encoded "
        "as tokenizer.json alone says, in training and in exported folders, which leave the rest out"
    ]


def export_files(
    given: Mapping[str, bytes], *, max_length: int, transformers_4: bool = False
) -> tuple[dict[str, bytes], dict[str, int | None]]:
    """({file name: bytes} to write, {"bos_token_id", "eos_token_id", "pad_token_id"} of config.json).

    tokenizer.json is written byte for byte, unless it truncates or pads, which nobody should. max_length:
    tokens at which texts are cut. transformers_4: whether that loads them too. UserError when there is no
    token to pad with, a named one is missing, or encoding is random.
    """
    if "tokenizer.json" not in given:
        raise UserError(
            f"an export needs tokenizer.json; the tokenizer has only {sorted(given) or 'no files'}"
        )
    content = given["tokenizer.json"]
    raw = json.loads(content)
    padding = raw.get("padding") or {}
    if raw.get("model", {}).get("dropout"):
        raise UserError(
            f"tokenizer.json: model.dropout is {raw['model']['dropout']}, so a text has other tokens each "
            "time; set it to null"
        )
    if raw.get("truncation") is not None or raw.get("padding") is not None:
        raw |= {"truncation": None, "padding": None}
        content = json_bytes(raw)
    tokenizer = Tokenizer.from_buffer(content)
    given_config = _config(given)
    roles = ("bos_token", "eos_token", "unk_token", "pad_token")
    names = {role: _content(given_config.get(role)) for role in roles}
    if names["pad_token"] is None:
        # Padding is masked in attention and pooling, so any token serves; sentence-transformers cannot batch
        # without one.
        special = [t.content for _, t in sorted(tokenizer.get_added_tokens_decoder().items()) if t.special]
        choices = [padding.get("pad_token"), *(names[f"{k}_token"] for k in ("eos", "bos", "unk")), *special]
        names["pad_token"] = next((t for t in choices if t and tokenizer.token_to_id(t) is not None), None)
        if names["pad_token"] is None:
            raise UserError(
                "the tokenizer has no special token that could pad a batch; name one as pad_token in "
                "tokenizer_config.json"
            )
    for key, token in names.items():
        if token is not None and tokenizer.token_to_id(token) is None:
            raise UserError(
                f"tokenizer_config.json names {key} {token!r}, which tokenizer.json does not have; name one "
                "that it has"
            )
    is_new = given_config.get("tokenizer_class") in (None, "", "TokenizersBackend")
    config: dict[str, Any] = {
        # Transformers 4 refuses TokenizersBackend, which is right where it would run the model causally.
        "tokenizer_class": FAITHFUL_CLASSES[is_new and not transformers_4],
        **{key: token for key, token in names.items() if token is not None},
        "model_max_length": max_length,
        # The library's default has token_type_ids, which LlamaModel.forward does not take.
        "model_input_names": ["input_ids", "attention_mask"],
        # As in training: "<|end_of_text|>" inside a text is ordinary text, never the special token.
        "split_special_tokens": True,
        "padding_side": "right",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    pre_tokenizer = raw.get("pre_tokenizer") or {}
    if "add_prefix_space" in pre_tokenizer:
        # Transformers 4 sets the pre-tokeniser to what this says, and to false where it says nothing.
        config["add_prefix_space"] = pre_tokenizer["add_prefix_space"]
    named = {role: token for role, token in names.items() if role != "unk_token"}
    ids = {f"{r}_id": None if t is None else tokenizer.token_to_id(t) for r, t in named.items()}
    return {"tokenizer.json": content, "tokenizer_config.json": json_bytes(config)}, ids


def added_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the post-processor puts before and after the tokens of a single text."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    words = ("a", "1", " ", *tokenizer.get_vocab())
    text = next((word for word in words if tokenizer.encode(word, add_special_tokens=False).ids), "")
    encoding = tokenizer.encode(text, add_special_tokens=True)
    is_text = [i for i, is_added in enumerate(encoding.special_tokens_mask) if not is_added]
    begin, end = (is_text[0], is_text[-1] + 1) if is_text else (len(encoding.ids),) * 2
    return encoding.ids[:begin], encoding.ids[end:]


def difference(a: bytes, b: bytes) -> str | None:
    """The first thing by which two tokenizer.json give other ids for a text, with its entries, or None.

    Compared: normaliser, pre-tokeniser, model with vocabulary and merges, added tokens, the ids that the
    post-processor adds. Not compared, as no id depends on it: layout and order of the JSON, decoder,
    truncation, padding, offsets, pairs of texts.
    """
    for ours, theirs in zip(_parts(a), _parts(b), strict=True):
        name, x, y = ours[0], ours[1], theirs[1]
        if x == y:
            continue
        if isinstance(x, dict) and isinstance(y, dict):
            keys = [key for key in [*x, *(key for key in y if key not in x)] if x.get(key) != y.get(key)]
            shown = "; ".join(f"{key!r} is {_short(x.get(key))} and {_short(y.get(key))}" for key in keys[:3])
            return f"{name} differs in {len(keys)} of {len(x.keys() | y.keys())} entries: {shown}"
        if name == "merges":
            at = next((i for i, (p, q) in enumerate(zip(x, y, strict=False)) if p != q), min(len(x), len(y)))
            entries = [_short(value[at]) if at < len(value) else "nothing" for value in (x, y)]
            return f"{name} ({len(x)} and {len(y)}) differ from rank {at} on: {entries[0]} and {entries[1]}"
        return f"{name} is {_short(x)} and {_short(y)}"
    return None


def _parts(content: bytes) -> Iterator[tuple[str, Any]]:
    """(component, its value in one spelling) in the order in which a text passes them."""
    tokenizer = Tokenizer.from_buffer(content)
    raw = json.loads(tokenizer.to_str())  # in the library's own spelling, defaults filled in
    tokens = {}
    for token in raw["added_tokens"]:
        # A special one is never found in a text, so how it would be found is nothing.
        how = {
            k: v for k, v in token.items() if not token["special"] and k not in ("id", "content", "special")
        }
        tokens[token["content"]] = {"id": token["id"], "special": token["special"], **how}
    yield "added tokens", tokens
    yield "normalizer", _steps(raw["normalizer"], "normalizers")
    yield "pre_tokenizer", _steps(raw["pre_tokenizer"], "pretokenizers")
    model = raw["model"]
    vocabulary, merges = model.pop("vocab", {}), model.pop("merges", [])
    yield "model", model
    if isinstance(vocabulary, list):  # Unigram: the place is the id
        vocabulary = {token: [i, score] for i, (token, score) in enumerate(vocabulary)}
    yield "vocabulary", vocabulary
    yield "merges", [tuple(merge) for merge in merges]
    before, after = added_ids(tokenizer)
    yield "post_processor", {"ids before a text": before, "ids after a text": after}


def _steps(value: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A component as a flat list: a sequence of one is that one, of none is nothing."""
    if value is None:
        return []
    if value["type"] == "Sequence":
        return [step for inner in value[key] for step in _steps(inner, key)]
    return [{k: v for k, v in value.items() if k != "trim_offsets"}]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:200] + "..."


def _config(files: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        config = parse(files.get("tokenizer_config.json", b"{}"))
    except ValueError as error:
        raise UserError(f"tokenizer_config.json is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"tokenizer_config.json holds a JSON {type(config).__name__} and must hold an object")
    return config


def _content(token: Any) -> str | None:
    """A special token of tokenizer_config.json: a string, or {"content": ...} in older files."""
    return token.get("content") if isinstance(token, dict) else token or None


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
