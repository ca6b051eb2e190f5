"""Two tokenizer.json are compared by the ids that they give; what no export could hand on is refused at the
start of a run."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from nemo_embed_core.data.tokenizer_files import added_ids, check_servable, difference
from nemo_embed_core.errors import UserError

WORDS = ["a", "b", "c", "ab", "bc", "abc"]


def content(
    change: Callable[[dict[str, Any]], Any] = lambda raw: None,
    setup: Callable[[Tokenizer], Any] = lambda t: None,
) -> bytes:
    tokenizer = Tokenizer(
        models.BPE({w: i for i, w in enumerate(WORDS)}, [("a", "b"), ("b", "c"), ("ab", "c")])
    )
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 6)])
    setup(tokenizer)
    raw = json.loads(tokenizer.to_str())
    change(raw)
    return json.dumps(raw).encode()


def template(single: str, **options: Any) -> Callable[[Tokenizer], None]:
    def setup(tokenizer: Tokenizer) -> None:
        special = [("<s>", 6), ("</s>", 7)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=special, **options
        )

    return setup


def sequence_of_one(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Sequence([normalizers.Sequence([normalizers.NFC()])])
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), tokenizer.post_processor]
    )


@pytest.mark.parametrize(
    "other",
    [
        json.dumps(json.loads(content()), indent=5, sort_keys=True).encode(),
        content(setup=lambda t: setattr(t, "decoder", decoders.ByteLevel())),
        content(setup=lambda t: (t.enable_truncation(3, direction="left"), t.enable_padding(length=7))),
        content(lambda raw: raw["model"].update(merges=[" ".join(pair) for pair in raw["model"]["merges"]])),
        content(lambda raw: raw["model"].update(vocab=dict(reversed(raw["model"]["vocab"].items())))),
        content(setup=sequence_of_one),
        # Type ids and pairs are of no use to a Llama.
        content(setup=template("<s>:1 $A:1", pair="<s> $A $B </s>")),
        # A special token is never found in a text.
        content(lambda raw: raw["added_tokens"][0].update(lstrip=True)),
        content(lambda raw: raw["pre_tokenizer"].update(trim_offsets=False)),
    ],
)
def test_the_same_tokenizer_in_other_bytes_is_the_same(other):
    assert other != content()
    assert difference(content(), other) is None and difference(other, content()) is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (content(lambda raw: raw["model"]["vocab"].update(a=1, b=0)), "vocabulary differs in 2 of 6 entries: "
        "'a' is 0 and 1"),
        (content(lambda raw: raw["model"]["merges"].reverse()), 'merges (3 and 3) differ from rank 0 on: '
        '["a", "b"] and ["ab", "c"]'),
        (content(lambda raw: raw["model"]["merges"].pop()), 'merges (3 and 2) differ from rank 2 on: ["ab", '
        '"c"] and nothing'),
        (content(setup=lambda t: setattr(t, "normalizer", normalizers.NFD())), 'normalizer is [{"type": '
        '"NFC"}] and [{"type": "NFD"}]'),
        (content(lambda raw: raw.update(normalizer=None)), 'normalizer is [{"type": "NFC"}] and []'),
        (content(lambda raw: raw["pre_tokenizer"].update(add_prefix_space=True)), "pre_tokenizer is "),
        (content(setup=template("<s> $A </s>")), "'ids after a text' is [] and [7]"),
        (content(lambda raw: raw.update(post_processor=None)), "'ids before a text' is [6] and []"),
        (content(setup=lambda t: t.add_tokens(["new"])), "added tokens differs in 1 of 3 entries: "
        "'new' is null and {"),
        (content(lambda raw: raw["added_tokens"][1].update(special=False)), "'</s>' is {"),
        (content(lambda raw: raw["model"].update(ignore_merges=True)), "model differs in 1 of "),
    ],
)  # fmt: skip
def test_what_differs_first_is_said_with_both_entries(other, message):
    assert message in (difference(content(), other) or "")


def test_the_ids_that_are_added_are_found_on_both_sides():
    assert added_ids(Tokenizer.from_buffer(content(setup=template("</s> <s> $A </s>")))) == ([7, 6], [7])
    assert added_ids(Tokenizer.from_buffer(content(lambda raw: raw.update(post_processor=None)))) == ([], [])


def files(tokenizer: bytes = b"", **config: Any) -> dict[str, bytes]:
    config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast", **config}
    return {"tokenizer.json": tokenizer or content(), "tokenizer_config.json": json.dumps(config).encode()}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, None),
        (
            {
                "add_bos_token": True,
                "add_eos_token": False,
                "truncation_side": "right",
                "padding_side": "left",
            },
            None,
        ),
        (
            {
                "additional_special_tokens": ["<s>"],
                "extra_special_tokens": {"x": "</s>"},
                "model_max_length": 9,
            },
            None,
        ),
        ({"add_eos_token": True}, "add_eos_token: true,"),
        ({"add_bos_token": False}, "add_bos_token: false,"),
        ({"truncation_side": "left"}, 'truncation_side: "left",'),
        ({"do_lower_case": True}, "do_lower_case: true,"),
        ({"tokenizer_class": "LlamaTokenizer"}, 'tokenizer_class: "LlamaTokenizer",'),
        (
            {"added_tokens_decoder": {"6": {"content": "<s>"}, "77": {"content": "<q>"}}},
            'special token "<q>",',
        ),
    ],
)
def test_what_only_tokenizer_config_says_is_said_at_the_start(config, says):
    said = check_servable(files(**config))
    assert (len(said) == 1 and says in said[0]) if says else not said
    assert says is None or said[0].count(": texts are encoded as tokenizer.json alone says") == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (files(content(lambda raw: raw["model"].update(dropout=0.1))), r"model.dropout is 0.1"),
        (files(pad_token="<pad>"), r"names pad_token '<pad>', which tokenizer.json does not have"),
        (files(content(lambda raw: raw.update(added_tokens=[], post_processor=None)), bos_token=None,
               eos_token=None), "no special token"),
        ({"tokenizer.json": content(), "tokenizer_config.json": b"{"},
        "tokenizer_config.json is not valid JSON"),
        ({"tokenizer.json": content(), "tokenizer_config.json": b"[]"}, "must hold an object"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_cannot_be_served_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        check_servable(given)
