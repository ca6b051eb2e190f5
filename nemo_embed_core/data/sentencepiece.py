"""A sentencepiece BPE model (Llama 2's kind) as a `tokenizers.Tokenizer` that gives the same ids."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from nemo_embed_core.errors import DataError

# Kinds of pieces of a sentencepiece model (ModelProto.SentencePiece.Type).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def from_sentencepiece(model_file: str | Path) -> tokenizers.Tokenizer:
    """A BPE model as a `tokenizers.Tokenizer` with the same ids and BOS in front.

    The same normalisation (charsmap, extra spaces, dummy prefix), pieces, merge order and byte fallback.
    Refused, because tokenizers has no exact counterpart: other model types, user-defined and unused pieces.
    """
    path = Path(model_file)
    try:
        proto = path.read_bytes()
        pieces, model_type, normalizer, suffix = _parse_model(proto)
    except (struct.error, IndexError, ValueError, UnicodeDecodeError) as error:
        raise DataError(path, None, f"not a sentencepiece model: {error}") from None
    if model_type != 2:
        # tokenizers' Unigram also matches control and byte pieces ("<s>", "<0x0A>") in ordinary text.
        name = {1: "unigram", 3: "word", 4: "char"}.get(model_type, str(model_type))
        raise DataError(
            path, None, f"a {name} model: only BPE models convert exactly; give a tokenizer.json instead"
        )
    if suffix:
        raise DataError(
            path, None, "treat_whitespace_as_suffix is not supported; train with whitespace as prefix"
        )
    for i, (piece, _, kind) in enumerate(pieces):
        if kind in (USER_DEFINED, UNUSED):
            raise DataError(
                path, None, f"piece {i} {piece!r} is user-defined or unused and has no exact counterpart in "
                "tokenizer.json; convert the model with its author's tool and give that tokenizer.json"
            )  # fmt: skip
    vocab = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise DataError(path, None, "two pieces of the model have the same text")
    unknown = next((i for i, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN), None)
    has_bytes = any(kind == BYTE for _, _, kind in pieces)
    if unknown is None:
        raise DataError(path, None, "the model has no unknown piece")
    merges, unk_token = _merges(pieces), pieces[unknown][0]
    bpe = models.BPE(vocab=vocab, merges=merges, unk_token=unk_token, fuse_unk=True, byte_fallback=has_bytes)
    backend = tokenizers.Tokenizer(bpe)
    steps: list[normalizers.Normalizer] = []
    if normalizer["charsmap"]:
        steps.append(normalizers.Precompiled(normalizer["charsmap"]))
    if normalizer["remove_extra_whitespaces"]:
        steps += [
            normalizers.Replace(tokenizers.Regex("^ +| +$"), ""),
            normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]
    if normalizer["add_dummy_prefix"]:
        steps.append(normalizers.Prepend("▁"))
    if normalizer["escape_whitespaces"]:
        steps.append(normalizers.Replace(" ", "▁"))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(content=" ", left=1)] if normalizer["add_dummy_prefix"] else [])
    )
    special = [piece for piece, _, kind in pieces if kind in (UNKNOWN, CONTROL)]
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    bos = next((piece for piece in ("<s>", "<bos>", "<|begin_of_text|>") if piece in special), None)
    if bos is None:
        raise DataError(path, None, f"the model has no BOS piece <s> among its control pieces {special}")
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocab[bos])]
    )
    return backend


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """The merge list of a BPE model: every split of every piece into two pieces, best score first.

    sentencepiece merges the adjacent pair whose joined piece scores highest; tokenizers wants the pairs
    ranked. Only normal pieces: a control piece is never made from text.
    """
    rank = {piece: i for i, (piece, _, kind) in enumerate(pieces) if kind == NORMAL}
    merges = []
    for piece, i in rank.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in rank and right in rank:
                merges.append((-pieces[i][1], i, rank[left], rank[right], left, right))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


def _parse_model(proto: bytes) -> tuple[list[tuple[str, float, int]], int, dict[str, Any], bool]:
    """(pieces, model_type, normaliser, treat_whitespace_as_suffix) of a serialised sentencepiece ModelProto.

    Field numbers from sentencepiece_model.proto. Read by hand (tag, varint, bytes): the generated protobuf
    module breaks with the protobuf version of the day.
    """
    pieces: list[tuple[str, float, int]] = []
    model_type, suffix = 1, False
    seen = set()
    normalizer: dict[str, Any] = {
        "charsmap": b"", "add_dummy_prefix": True, "remove_extra_whitespaces": True,
        "escape_whitespaces": True,
    }  # fmt: skip
    for number, value in _fields(proto):
        seen.add(number)
        if number == 1:
            piece: dict[int, Any] = {2: 0.0, 3: NORMAL, **dict(_fields(value))}
            pieces.append((piece[1].decode("utf-8"), piece[2], piece[3]))
        elif number == 2:
            spec = dict(_fields(value))
            model_type, suffix = spec.get(3, 1), bool(spec.get(24, 0))
        elif number == 3:
            spec = dict(_fields(value))
            normalizer["charsmap"] = spec.get(2, b"")
            normalizer["add_dummy_prefix"] = bool(spec.get(3, 1))
            normalizer["remove_extra_whitespaces"] = bool(spec.get(4, 1))
            normalizer["escape_whitespaces"] = bool(spec.get(5, 1))
    if not seen.issuperset({1, 2, 3}):
        raise ValueError("pieces, trainer or normaliser are missing: is the file truncated?")
    return pieces, model_type, normalizer, suffix


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of one protobuf message: varints as int, fixed32 as float, the rest as bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise ValueError("varint too long")

    while at < len(data):
        tag = varint()
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            yield number, varint()
        elif wire == 5:
            yield number, struct.unpack_from("<f", data, at)[0]
            at += 4
        elif wire == 1:
            at += 8
        elif wire == 2:
            size = varint()
            if at + size > len(data):
                raise ValueError(f"field {number} of {size} bytes ends after the file")
            yield number, data[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {wire} of field {number}")
