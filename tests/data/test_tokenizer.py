"""Ids: equal to sentencepiece's and to AutoTokenizer's, no text ever becomes a special token, truncation is
counted."""

import json
import random
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from nemo_embed_core.data.prompts import query_prompt
from nemo_embed_core.data.sentencepiece import BYTE, CONTROL, NORMAL, _merges, from_sentencepiece
from nemo_embed_core.data.tokenizer import load_tokenizer, train_sentencepiece
from nemo_embed_core.errors import DataError, UserError

PARTS = ["a", "aa", " ", "  ", "\n", "\t", "-", "--", "====", "é", "日本", "▁", "the", " the", "<s>", "</s>",
         "<unk>", "<pad>", "<0x0A>", "0", "17", "\u2028", "\u00a0", "😀", "ﬁ", "½", "e\u0301", "\0",
         "self.", "def "]  # fmt: skip


def many_texts(count: int, seed: int = 0) -> list[str]:
    """Pieces of real source text the tokenizer was not trained on, odd concatenations, and long runs."""
    rng = random.Random(seed)
    source = (Path(sysconfig.get_paths()["stdlib"]) / "typing.py").read_text(encoding="utf-8")
    texts = ["", " ", "x"]
    for _ in range(count):
        at = rng.randrange(len(source))
        texts.append(source[at : at + rng.choice([1, 7, 60, 300])])
        texts.append("".join(rng.choice(PARTS) for _ in range(rng.randrange(25))))
    texts += [c * n for c in " -=a_#*." for n in range(1, 70)]
    return texts


def test_prompt_is_the_papers():
    assert query_prompt("Find it") == "Instruct: Find it\nQuery: "
    assert query_prompt("") == ""


def test_trained_bpe_gives_sentencepieces_ids(tokenizer_folder, tokenizer):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))
    texts = many_texts(1000)
    for text, ids in zip(texts, tokenizer.encode(texts, 1 << 20), strict=True):
        assert ids.tolist() == [1, *reference.encode(text)], repr(text)
    assert tokenizer.vocab_size == reference.vocab_size() == 800
    assert ids.dtype == np.int32


def test_foreign_sentencepiece_model_with_nfkc_and_extra_whitespace_rules(tmp_path):
    """The defaults of other people's models: nmt_nfkc charsmap, collapsed spaces, dummy prefix, with byte
    fallback."""
    source = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text(encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(source.split("\n")), model_prefix=str(tmp_path / "m"), vocab_size=700,
        model_type="bpe", byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    backend = from_sentencepiece(tmp_path / "m.model")
    backend.encode_special_tokens = True
    wrong = [t for t in many_texts(500) if backend.encode(t).ids != [1, *reference.encode(t)]]
    assert not wrong, wrong[:5]
    # A folder that holds nothing but the model loads too.
    assert load_tokenizer(tmp_path).encode(["def f(x)"], 99)[0].tolist() == [1, *reference.encode("def f(x)")]


def test_no_merge_makes_a_control_or_byte_piece():
    """Else "<s>" typed in a text would be merged into BOS although nobody looks for special tokens there."""
    normal = ["<", "s", ">", "<s", "ss", "sss"]
    pieces = [
        ("<s>", 0.0, CONTROL),
        ("s>", 0.0, BYTE),
        *((piece, -float(i), NORMAL) for i, piece in enumerate(normal)),
    ]
    assert _merges(pieces) == [("<", "s"), ("s", "s"), ("s", "ss"), ("ss", "s")]


def test_auto_tokenizer_gives_our_ids(tokenizer_folder, tokenizer):
    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    # Ordinary text: transformers does read "<s>" in a text as BOS, which is what we refuse to do.
    texts = [t for t in many_texts(300) if not any(s in t for s in ("<s>", "</s>", "<unk>", "<pad>"))]
    ours = tokenizer.encode(texts, 64)
    assert any(len(ids) == 64 for ids in ours)
    # As sentence-transformers calls it; model_max_length is 64.
    batch = auto(texts, padding=True, truncation=True)
    for text, ids, auto_ids, mask in zip(
        texts, ours, batch["input_ids"], batch["attention_mask"], strict=True
    ):
        assert np.array(auto_ids)[np.array(mask, bool)].tolist() == ids.tolist(), repr(text)
    assert (auto.pad_token_id, auto.bos_token_id, auto.model_max_length) == (3, 1, 64)
    text = "two  spaces\nand é 日本 😀"
    assert auto.decode(auto(text)["input_ids"], skip_special_tokens=True) == text


def llama3_like(tmp_path: Path, *, bos: bool = True, eos: bool = False) -> Path:
    """A byte-level BPE with Llama-3's special tokens and post-processor."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the text of a page and the end of it"] * 5, trainer)
    single = ("<|begin_of_text|> " if bos else "") + "$A" + (" <|end_of_text|>" if eos else "")
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<|begin_of_text|>", 0), ("<|end_of_text|>", 1)]
    )
    backend.enable_padding(length=50)  # as some published files have it; we must switch it off
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


INJECTION = "before <|end_of_text|> after <|begin_of_text|>"


def test_special_token_strings_in_a_text_stay_text(tmp_path):
    folder = llama3_like(tmp_path)
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert {0, 1} <= set(plain.encode(INJECTION).ids[1:]), (
        "the library alone does inject: the test sees the difference"
    )
    ids = load_tokenizer(folder).encode([INJECTION], 999)[0]
    assert ids[0] == 0 and not {0, 1}.intersection(ids[1:].tolist())
    assert plain.decode(ids[1:].tolist()) == INJECTION
    text = "the end of a page"
    plain.no_padding()
    assert load_tokenizer(folder).encode([text], 999)[0].tolist() == plain.encode(text).ids, (
        "ordinary text is unchanged"
    )


def test_truncation_keeps_special_tokens_and_is_counted(tmp_path):
    tokenizer = load_tokenizer(llama3_like(tmp_path, eos=True))
    short, exact, long = tokenizer.encode(["a", "aaaaaa", "a" * 500], 8)
    assert short.tolist()[0] == 0 and short.tolist()[-1] == 1 and len(short) == 3
    assert len(exact) == 8 and len(long) == 8
    assert long.tolist() == exact.tolist()
    assert tokenizer.num_truncated == 1, "a text that just fits is not truncated"
    full = tokenizer.encode(["a" * 500], 1000)[0]
    assert len(full) == 502, "the length of one call does not leak into the next"


def test_loading_needs_no_transformers_and_no_torch(tokenizer_folder):
    code = (
        "import sys; from nemo_embed_core.data.tokenizer import load_tokenizer; "
        f"load_tokenizer({str(tokenizer_folder)!r}).encode(['x'], 9); "
        "print(sorted({'torch', 'transformers', 'sentencepiece'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_files_for_export_and_digest(tokenizer_folder, tmp_path):
    tokenizer = load_tokenizer(tokenizer_folder)
    assert tokenizer.files["tokenizer.json"] == (tokenizer_folder / "tokenizer.json").read_bytes()
    assert (
        tokenizer.files["tokenizer_config.json"] == (tokenizer_folder / "tokenizer_config.json").read_bytes()
    )
    bare = load_tokenizer(tokenizer_folder / "tokenizer.model")  # no tokenizer.json read: converted anew
    assert bare.digest == tokenizer.digest
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.files["tokenizer.json"])
    made = json.loads(load_tokenizer(tmp_path).files["tokenizer_config.json"])
    assert made["bos_token"] == "<s>" and made["pad_token"] == "<pad>"
    assert load_tokenizer(llama3_like(tmp_path)).digest != tokenizer.digest


def test_long_lines_are_trained_on_not_skipped(tmp_path):
    """sentencepiece silently leaves out sentences above its limit; ours are cut into shorter ones."""
    line = "zebra crossing " * 2000  # 30 kB in one line
    tokenizer = train_sentencepiece([line], 280, tmp_path)
    assert len(tokenizer.encode(["zebra"], 99)[0]) <= 3


# ------------------------------------------------------------------------------------------ errors


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist.*tokenizer\.json"):
        load_tokenizer(tmp_path / "nowhere")


def test_folder_without_tokenizer_names_what_is_there(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"no tokenizer\.json.*model\.safetensors"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"{}", b"\xff", b"[1]", b""])
def test_broken_json(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json: not a readable tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello, not a model", b"\x0a\xff\xff\x03ab", b"\xff" * 20])
def test_broken_sentencepiece_model(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.model: not a sentencepiece model"):
        load_tokenizer(tmp_path)


def test_truncated_sentencepiece_model_is_refused_at_any_byte(tokenizer_folder, tmp_path):
    whole = (tokenizer_folder / "tokenizer.model").read_bytes()
    for cut in range(1, len(whole), 397):
        (tmp_path / "tokenizer.model").write_bytes(whole[:cut])
        try:
            loaded = load_tokenizer(tmp_path)
        except UserError:
            continue
        pytest.fail(f"{cut} of {len(whole)} bytes loaded as a tokenizer of {loaded.vocab_size} ids")


def test_user_defined_pieces_are_refused_not_mangled(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the text of a page and the end of it"] * 9),
        model_prefix=str(tmp_path / "m"), vocab_size=290, model_type="bpe", byte_fallback=True,
        user_defined_symbols=["<sep>"], minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"'<sep>' is user-defined"):
        load_tokenizer(tmp_path / "m.model")


def test_unigram_models_are_refused_not_approximated(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the text of a page and the end of it"] * 9),
        model_prefix=str(tmp_path / "m"), vocab_size=40, model_type="unigram", minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"a unigram model: only BPE"):
        load_tokenizer(tmp_path / "m.model")


def test_text_of_no_tokens_is_an_error(tmp_path):
    tokenizer = load_tokenizer(llama3_like(tmp_path, bos=False))
    with pytest.raises(UserError, match=r"text 1 gives 0 tokens.*BOS"):
        tokenizer.encode(["a", ""], 8)


@pytest.mark.parametrize(("bad", "fragment"), [("x\ud83d", "lone surrogate"), (None, "NoneType"), (3, "int")])
def test_what_is_not_text_is_named(tokenizer, bad, fragment):
    with pytest.raises(UserError, match=f"text 1 .*{fragment}"):
        tokenizer.encode(["fine", bad], 8)


def test_lengths_too_short_for_anything(tokenizer):
    with pytest.raises(UserError, match=r"max_length=1 leaves no room.*at least 2"):
        tokenizer.encode(["x"], 1)
    with pytest.raises(UserError, match=r"query_max_length=1 leaves no room.*at least 2"):
        tokenizer.check_prompt("", 1, "query_max_length")
    prompt = query_prompt("Given a question, retrieve the passages that answer it")
    length = len(tokenizer.encode([prompt], 999)[0])
    tokenizer.check_prompt(prompt, length + 4, "data.query_max_length")
    for room, what in (
        (0, f"alone has {length}; raise"),
        (3, f"alone has {length} and 3 for the text tell few texts apart"),
    ):
        with pytest.raises(
            UserError, match=rf"data.query_max_length={length + room} .*{what}.*at least {length + 4}"
        ):
            tokenizer.check_prompt(prompt, length + room, "data.query_max_length")
    with pytest.raises(UserError, match=rf"document_max_length={length} tokens leaves no room for text"):
        tokenizer.encode(["x"], length, prompt, "document_max_length")


def test_vocabulary_larger_than_the_text_allows(tmp_path):
    with pytest.raises(UserError, match=r"could not train 5000 pieces.*smaller vocabulary"):
        train_sentencepiece(["too little text"], 5000, tmp_path)
