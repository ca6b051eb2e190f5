"""Texts to token ids with the `tokenizers` library alone; sentencepiece models are converted.

A special token's string inside a text (`<|end_of_text|>` in a web page) stays ordinary text: only the
post-processor of the tokenizer adds special ids (BOS for Llama).
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from nemo_embed_core.data import cuts
from nemo_embed_core.data.sentencepiece import from_sentencepiece
from nemo_embed_core.errors import DataError, UserError

MIN_ROOM = 4  # tokens that a prompt must leave for the text: with fewer most texts become the same
BATCH_CHARACTERS = 1 << 20  # per call of the library, which takes about 23 bytes of memory for each
HELD_CHARACTERS = 8 << 20  # of whole texts in memory at a time
CHARACTERS_PER_TOKEN = 8  # the first guess at the prefix of a text that has enough tokens


class Tokenizer:
    """`tokenizers.Tokenizer` without padding, truncating to max_length; text never becomes a special id.

    vocab_size: largest id + 1, added tokens included.  digest: sha256 of tokenizer.json (hex).
    files: tokenizer.json and tokenizer_config.json as bytes, to be written beside exported weights.
    num_encoded, num_truncated: texts encoded so far, and how many of them lost tokens; take differences.
    """

    def __init__(self, backend: tokenizers.Tokenizer, files: dict[str, bytes]):
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # "<s>" in a text is three characters, not BOS
        self._backend = backend
        self._max_length = 0  # what the backend truncates to now; 0: it does not
        self._lock = threading.Lock()  # of that, where one thread encodes and another asks check_prompt
        self._num_special = backend.num_special_tokens_to_add(is_pair=False)
        bare = backend.encode("a", add_special_tokens=False).ids
        whole = backend.encode("a").ids
        begin = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        self.end_tokens: list[int] = whole[begin + len(bare) :]  # the post-processor's, behind every text
        self._boundary = cuts.boundary(backend)
        self._prompts: set[tuple[str, int]] = set()  # that passed check_prompt
        self.files = files
        self.digest = hashlib.sha256(files["tokenizer.json"]).hexdigest()
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.num_encoded = self.num_truncated = 0

    def encode(
        self, texts: Iterable[str], max_length: int, prompt: str = "", name: str = "max_length"
    ) -> list[np.ndarray]:
        """ids of prompt + text, an int32 array per text: special tokens added, at most max_length ids.

        See encode_cut."""
        return self.encode_cut(texts, max_length, prompt, name)[0]

    def encode_cut(
        self, texts: Iterable[str], max_length: int, prompt: str = "", name: str = "max_length"
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """(encode(...), bool [texts]: which of them lost tokens).

        Texts are taken one batch after another, so they may come from a disk; memory and time do not grow
        with what is cut off, where a text can be cut before it is tokenised (data/cuts.py). Raises UserError
        for a prompt that leaves no room (named `name`), for a text that gives no token at all (no BOS and
        nothing the vocabulary knows) and for a text that is not Unicode (lone surrogates).
        """
        self.check_prompt(prompt, max_length, name)
        out, cut = list[np.ndarray](), list[np.ndarray]()
        for batch in _batches(texts):
            arrays, is_cut = self._encode_batch(batch, len(out), max_length, prompt)
            out += arrays
            cut.append(is_cut)
        return out, np.concatenate([np.zeros(0, bool), *cut])

    def _encode_batch(
        self, texts: list[str], first: int, max_length: int, prompt: str
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """encode_cut() of texts that messages call `first` and on: of longer and longer prefixes."""
        out, truncated = [_NOTHING] * len(texts), np.zeros(len(texts), bool)
        todo, num_characters = list(range(len(texts))), CHARACTERS_PER_TOKEN * max_length
        while todo:
            ends = [self._cut(texts[i], num_characters) for i in todo]
            parts = [prompt + texts[i][:end] for i, end in zip(todo, ends, strict=True)]
            encoded = self._encode(parts, [first + i for i in todo], max_length)
            again = []
            for i, end, (ids, overflows) in zip(todo, ends, encoded, strict=True):
                is_cut = end < len(texts[i])
                if is_cut and not overflows:  # the prefix alone does not fill max_length
                    again.append(i)
                    continue
                if not len(ids):
                    raise UserError(
                        f"text {first + i} gives 0 tokens ({texts[i][:40]!r}): the tokenizer adds no BOS; "
                        "use a tokenizer whose post-processor adds one, or remove the text"
                    )
                if is_cut:
                    _check_unicode(texts[i], first + i)  # of the prefix the library has done so
                truncated[i] = overflows
                out[i] = ids
            todo, num_characters = again, 4 * num_characters
        self.num_encoded += len(texts)
        self.num_truncated += int(truncated.sum())
        return out, truncated

    def _cut(self, text: str, num_characters: int) -> int:
        """The first place after num_characters where a cut leaves the ids before it, or the end."""
        if self._boundary is None or len(text) <= num_characters:
            return len(text)
        found = self._boundary.search(text, num_characters)
        return found.start() if found else len(text)

    def _encode(
        self, texts: list[str], names: Sequence[int], max_length: int
    ) -> Iterator[tuple[np.ndarray, bool]]:
        """(ids, whether there were more than max_length) of each text; names: what a message calls them."""
        for start, end in _runs([len(text) for text in texts], BATCH_CHARACTERS):
            try:
                with self._lock:
                    if max_length != self._max_length:
                        self._backend.enable_truncation(max_length)
                        self._max_length = max_length
                    encodings = self._backend.encode_batch_fast(texts[start:end], add_special_tokens=True)
            except TypeError:
                for i, text in zip(names, texts, strict=True):
                    _check_unicode(text, i)
                raise
            for encoding in encodings:
                ids = np.array(encoding.ids, dtype=np.int32)
                yield ids, len(ids) == max_length and bool(encoding.overflowing)

    def decode(self, ids: np.ndarray) -> str:
        """The text of the ids, special tokens in it; U+FFFD where they begin or end within a character."""
        return str(self._backend.decode(ids.tolist(), skip_special_tokens=False))

    def check_fits(self, vocab_size: int) -> None:
        """Every id has an embedding: on a GPU a missing one is a device-side assert, hours in."""
        if self.vocab_size > vocab_size:
            raise UserError(
                f"the tokenizer makes ids up to {self.vocab_size - 1}, but model.vocab_size={vocab_size}; "
                "use the tokenizer that belongs to the model, or a larger vocabulary"
            )

    def check_prompt(self, prompt: str, max_length: int, name: str) -> None:
        """UserError when the prompt leaves fewer than MIN_ROOM of max_length: texts would become the same.

        encode() asks this of every prompt; callers ask it before they read or embed anything.
        """
        if max_length <= self._num_special:
            raise UserError(
                f"{name}={max_length} leaves no room for text: the tokenizer adds {self._num_special} "
                f"special token(s); use at least {self._num_special + 1}"
            )
        if not prompt or (prompt, max_length) in self._prompts:
            return
        ((ids, _),) = self._encode([prompt], [0], 1 << 20)
        room = max_length - len(ids)
        if room < MIN_ROOM:
            raise UserError(
                f"{name}={max_length} tokens leaves no room for text: the instruction {prompt[:60]!r} alone "
                f"has {len(ids)}{f' and {room} for the text tell few texts apart' if room > 0 else ''}; "
                f"raise {name} to at least {len(ids) + MIN_ROOM} (better: {len(ids)} plus the length of the "
                "texts)"
            )
        self._prompts.add((prompt, max_length))


_NOTHING = np.empty(0, np.int32)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts that have at most HELD_CHARACTERS together, or of one text."""
    batch: list[str] = []
    held = count = 0
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"text {count} is a {type(text).__name__}, not a string")
        if batch and held + len(text) > HELD_CHARACTERS:
            yield batch
            batch, held = [], 0
        batch.append(text)
        held, count = held + len(text), count + 1
    if batch:
        yield batch


def _runs(lengths: Sequence[int], limit: int) -> Iterator[tuple[int, int]]:
    """(start, end) of neighbours whose lengths sum to at most limit, or of one."""
    start = size = 0
    for i, length in enumerate(lengths):
        if i > start and size + length > limit:
            yield start, i
            start, size = i, 0
        size += length
    if start < len(lengths):
        yield start, len(lengths)


def _check_unicode(text: str, i: int) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"text {i} has a lone surrogate and is not Unicode text: {text[:40]!r}") from None


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a folder (tokenizer.json, else a sentencepiece *.model) or of one such file.

    A tokenizer_config.json beside it is kept for export; where there is none a minimal one is made, with
    which `transformers.AutoTokenizer` gives the same ids.
    """
    path = Path(path)
    if path.is_dir():
        candidates = [path / "tokenizer.json", path / "tokenizer.model", *sorted(path.glob("*.model"))]
        file = next((c for c in candidates if c.is_file()), None)
        if file is None:
            found = ", ".join(sorted(p.name for p in path.iterdir())[:10]) or "nothing"
            raise UserError(f"{path} has no tokenizer.json and no tokenizer.model (it holds: {found})")
    elif path.is_file():
        file = path
    else:
        raise UserError(
            f"tokenizer {path} does not exist; give a folder with tokenizer.json or tokenizer.model"
        )

    if file.suffix == ".model":
        backend = from_sentencepiece(file)
        content = backend.to_str(pretty=True).encode()
    else:
        content = file.read_bytes()
        try:
            backend = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception for any broken file
            raise DataError(file, None, f"not a readable tokenizer.json: {error}") from None
    config_file = file.with_name("tokenizer_config.json")
    config = config_file.read_bytes() if config_file.is_file() else _tokenizer_config(backend)
    return Tokenizer(backend, {"tokenizer.json": content, "tokenizer_config.json": config})


def _tokenizer_config(backend: tokenizers.Tokenizer, model_max_length: int = 131072) -> bytes:
    """tokenizer_config.json for AutoTokenizer: the backend as it is, a pad token where there is one."""
    vocab = backend.get_vocab(with_added_tokens=True)
    names = {
        "bos_token": ("<s>", "<|begin_of_text|>", "[CLS]"),
        "eos_token": ("</s>", "<|end_of_text|>", "[SEP]"),
        "unk_token": ("<unk>", "[UNK]"),
        "pad_token": ("<pad>", "[PAD]", "<|finetune_right_pad_id|>", "</s>", "<|end_of_text|>", "<unk>"),
    }
    config: dict[str, Any] = {
        key: next((t for t in tokens if t in vocab), None) for key, tokens in names.items()
    }
    config = {key: token for key, token in config.items() if token is not None}
    config["model_input_names"] = ["input_ids", "attention_mask"]
    config["clean_up_tokenization_spaces"] = False
    config["model_max_length"] = model_max_length
    # This class name loads tokenizer.json unchanged in transformers 4 and 5; "LlamaTokenizer" would rebuild
    # it.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


# ------------------------------------------------------------------------------------------ training


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, folder: str | Path, max_length: int = 512
) -> Tokenizer:
    """Trains a BPE model with byte fallback; writes tokenizer.model, tokenizer.json, tokenizer_config.json.

    Ids: 0 <unk>, 1 <s> (BOS, added to every text), 2 </s>, 3 <pad>, 4..259 the bytes, then pieces. Text is
    taken as it is (no Unicode normalisation, spaces kept), digits one by one, as Llama's own. max_length:
    model_max_length written for transformers. The folder loads with `transformers.AutoTokenizer` to the same
    ids as ours.
    """
    import io

    import sentencepiece

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=MAX_SENTENCE,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"sentencepiece could not train {vocab_size} pieces on these texts: {error}. "
            "Give more text or a smaller vocabulary (at least 260 plus the number of different characters)"
        ) from None
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    backend = from_sentencepiece(folder / "tokenizer.model")
    (folder / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
    (folder / "tokenizer_config.json").write_bytes(_tokenizer_config(backend, model_max_length=max_length))
    return load_tokenizer(folder)


MAX_SENTENCE = 4192  # bytes; sentencepiece skips longer ones in silence


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines of at most MAX_SENTENCE bytes: the unit that sentencepiece trains on, nothing left out."""
    for text in texts:
        for line in text.split("\n"):
            for at in range(0, len(line), MAX_SENTENCE // 4):  # a character has at most 4 bytes
                yield line[at : at + MAX_SENTENCE // 4]
