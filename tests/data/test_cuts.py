"""Cutting a text before it is tokenised gives the ids of the whole text, for every kind of tokenizer and of
text."""

import json
import random
import tracemalloc

import pytest
import tokenizers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors, trainers

from nemo_embed_core.data import cuts
from nemo_embed_core.data import tokenizer as tokenizer_module
from nemo_embed_core.data.sentencepiece import from_sentencepiece
from nemo_embed_core.data.tokenizer import Tokenizer
from nemo_embed_core.errors import UserError

CORPUS = [
    "the text of a page, and the end of it: don't we'll 12345 678 (x + y) = z!  two  spaces\n\n next "
    "line\r\n\ttab",
    "日本語のテキスト。中文文本，没有空格！한국어 텍스트 입니다 Ελληνικά кириллица עברית العربية हिन्दी ไทย",
    "café cafe\u0301 ﬁne ½ ① 😀😀👩‍👩‍👧 \u00a0nbsp \u3000wide \u200bzero e\u0301\u0323 ǆ İ ſ ﷺ",
] * 4
PIECES = [
    "a", "Z", "word", "don't", "'s", "'", "’", "1", "1234567", "½", "²", " ", "  ", "\n", "\r\n", "\t",
    "\u00a0", "\u3000", "\u2028", "\u200b", "\u0301", "\u0323", "\u3099", "\u0600", "\u0e33", "日", "日本語",
    "か", "。", "，", "！", "「", "한국", "\u1161", "é", "e\u0301", "ﬁ", "ſ", "İ", "Σ", "😀", "👩‍👩‍👧", ".",
    ". ", "!!!", "▁", "▁a", "<s>", "</s>", "<|end|>", "_", "--", "\0", "\ufffd", "หน",
]  # fmt: skip


def texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    out = [piece * 300 for piece in PIECES] + [
        piece * 150 + " x" * 90 for piece in (" ", "\n", "a", "0", "日", "\u0301")
    ]
    for _ in range(count):
        few = rng.choices(PIECES, k=rng.choice([2, 4, len(PIECES)]))
        out.append("".join(rng.choice(few) for _ in range(rng.choice([5, 60, 400]))))
    return out


LLAMA3 = cuts._CL100K % "{1,3}"


def bpe(pre_tokenizer, normalizer=None, post="<s> $A", **options) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(**options))
    backend.pre_tokenizer, backend.normalizer = pre_tokenizer, normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=700, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet,
        show_progress=False)
    )  # fmt: skip
    backend.post_processor = processors.TemplateProcessing(
        single=post, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return backend


def byte_level(regex: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(tokenizers.Regex(regex), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def sentencepiece_model(folder, **options) -> tokenizers.Tokenizer:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(folder / "m"), vocab_size=600, model_type="bpe",
        byte_fallback=True, minloglevel=2, hard_vocab_limit=False, character_coverage=0.98, **options,
    )  # fmt: skip
    return from_sentencepiece(folder / "m.model")


KINDS = {
    "llama-3": lambda _: bpe(byte_level(LLAMA3), ignore_merges=True),
    "qwen-2": lambda _: bpe(byte_level(cuts._CL100K % ""), normalizers.NFC(), post="$A </s>"),
    "gpt-2": lambda _: bpe(pre_tokenizers.ByteLevel(add_prefix_space=True), normalizers.NFKC(),
                           post="<s> $A </s>"),
    "nfd": lambda _: bpe(pre_tokenizers.ByteLevel(),
                         normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()])),
    "metaspace": lambda _: bpe(pre_tokenizers.Metaspace(), unk_token="</s>"),
    "metaspace in one": lambda _: bpe(pre_tokenizers.Metaspace(split=False), byte_fallback=False,
                                      unk_token="</s>", fuse_unk=True),
    "sentencepiece nmt_nfkc": lambda folder: sentencepiece_model(folder),
    "sentencepiece as llama-2": lambda folder: sentencepiece_model(
        folder, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True
    ),
}  # fmt: skip
NOT_CUT = {"metaspace in one"}  # its training without words makes pieces that span two


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("added", [False, True])
def test_ids_are_those_of_the_whole_text(kind, added, tmp_path, monkeypatch):
    backend = KINDS[kind](tmp_path)
    if added:
        backend.add_tokens(
            [AddedToken("wordword"), AddedToken("日日", single_word=True), AddedToken("!!", lstrip=True)]
        )
    whole = tokenizers.Tokenizer.from_str(backend.to_str())
    whole.encode_special_tokens = True
    subject = Tokenizer(backend, {"tokenizer.json": b""})
    assert (subject._boundary is None) == (kind in NOT_CUT)
    # Prefixes so short that nearly every text is cut, most of them several times.
    monkeypatch.setattr(tokenizer_module, "CHARACTERS_PER_TOKEN", 1)
    samples = texts(400, seed=len(kind))
    for max_length in (4, 9, 40):
        whole.enable_truncation(max_length)
        expected = whole.encode_batch(samples)
        before = subject.num_truncated
        for text, ids, reference in zip(samples, subject.encode(samples, max_length), expected, strict=True):
            assert ids.tolist() == reference.ids, (max_length, text[:200])
        assert (
            subject.num_truncated - before
            == sum(len(reference.overflowing) > 0 for reference in expected)
            > 99
        )


def test_unknown_steps_are_not_cut(tmp_path):
    """Each of these could make or move a boundary: a pattern we have not read, a replacement, an added token
    with a space."""

    def is_cut(backend) -> bool:
        return cuts.boundary(backend) is not None

    known = pre_tokenizers.ByteLevel()
    assert is_cut(bpe(known))
    assert not is_cut(bpe(byte_level(r"\p{L}+ \p{L}+|.")))
    assert not is_cut(bpe(pre_tokenizers.Sequence([pre_tokenizers.Split("a b", "isolated"), known])))
    assert not is_cut(bpe(known, normalizers.Replace("a ", "b")))
    assert not is_cut(bpe(known, normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])))
    assert not is_cut(bpe(pre_tokenizers.ByteLevel(use_regex=False)))
    assert not is_cut(bpe(known, dropout=0.5))
    spaced = bpe(known)
    spaced.add_tokens([AddedToken("New York")])
    assert not is_cut(spaced)
    eats = bpe(known)
    eats.add_tokens([AddedToken("a", rstrip=True)])
    assert not is_cut(eats)
    # sentencepiece's way, with one piece that spans two words.
    spec = json.loads(sentencepiece_model(tmp_path).to_str())
    assert is_cut(tokenizers.Tokenizer.from_str(json.dumps(spec)))
    spec["model"]["vocab"]["e▁the"] = len(spec["model"]["vocab"])
    assert not is_cut(tokenizers.Tokenizer.from_str(json.dumps(spec)))


def test_memory_does_not_grow_with_a_text_and_many_are_read_in_batches():
    subject = Tokenizer(bpe(byte_level(LLAMA3)), {"tokenizer.json": b""})
    held = []

    def documents(count, length):
        for _ in range(count):
            held.append("the text of a page " * (length // 19))
            yield held[-1]
            held.clear()

    def peak(count, length):
        tracemalloc.start()
        ids = subject.encode(documents(count, length), 64)
        assert [len(row) for row in ids] == [64] * count
        value = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return value

    calls = []
    encode = subject._backend.encode_batch_fast
    subject._backend = type("Spy", (), {
        "encode_batch_fast": lambda self, batch, **options:
            calls.append(sum(map(len, batch))) or encode(batch, **options),
        "enable_truncation": subject._backend.enable_truncation,
    })()  # fmt: skip
    subject._max_length = 0
    assert peak(60, 1_000_000) < 3 * tokenizer_module.HELD_CHARACTERS, "60 MB of text"
    assert sum(calls) < 60 * 64 * 16, "what is cut off is never tokenised"
    calls.clear()
    subject.encode(["日" * 9000] * 300, 64)
    assert max(calls) <= tokenizer_module.BATCH_CHARACTERS + 9000


def test_a_lone_surrogate_behind_the_cut_is_still_an_error():
    subject = Tokenizer(bpe(byte_level(LLAMA3)), {"tokenizer.json": b""})
    with pytest.raises(UserError, match="text 1 has a lone surrogate"):
        subject.encode(["fine", "the text " * 500 + "\ud83d"], 8)
