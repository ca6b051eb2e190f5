"""What onnxruntime and llama.cpp's server make of a folder on the CPU, in a fresh process.

    python clients.py CONSUMER FOLDER REQUEST.json OUTPUT.npz

Imports nothing of this package, so that it sees the folder as any user does: prompts and the limit are those
of the sentence-transformers files. REQUEST.json: {"file", "texts", "num_prompted", "num_repeats"}; the last
text is the long one, and num_repeats of it must be cut; file: what is read of the folder.

OUTPUT.npz holds, for N texts of D channels, M of them with prompts:

    version                 of the library
    token_ids, token_counts of all texts in a row, and of the long one repeated
    alone_ND, together_ND   each text by itself, several at a time (padded on the right where the caller pads)
    left_padded_ND          the same padded on the left, where the caller pads
    cut_1D, queries_MD, documents_MD    the long text repeated, [1, D]; with the prompts of each side
"""

import json
import sys
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

TOGETHER, PROVIDERS = 4, ["CPUExecutionProvider"]  # texts at a time; of onnxruntime


class OnnxRuntime:
    def __init__(self, folder: Path, file: str, limit: int):
        import onnxruntime
        from tokenizers import Tokenizer

        self.version = f"onnxruntime {onnxruntime.__version__}"
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(limit)
        self.tokenizer.encode_special_tokens = True  # split_special_tokens of tokenizer_config.json
        self.session = onnxruntime.InferenceSession(folder / file, providers=PROVIDERS)

    def tokenize(self, text):
        return self.tokenizer.encode(text).ids

    def embed(self, texts, left=False):
        rows = [self.tokenize(text) for text in texts]
        longest = max(map(len, rows))
        ids_NL, mask_NL = np.zeros((2, len(rows), longest), np.int64)
        for i, row in enumerate(rows):
            at = slice(longest - len(row), None) if left else slice(len(row))
            ids_NL[i, at], mask_NL[i, at] = row, 1
        inputs = {"input_ids": ids_NL, "attention_mask": mask_NL}
        return self.session.run(["sentence_embedding"], inputs)[0]


class LlamaCpp:
    """llama-server in this process: a text is given as text where it reads no special token in it, else, and
    where it is too long, as its tokens."""

    def __init__(self, folder: Path, file: str, limit: int):
        import xllamacpp

        self.limit, self.version = limit, f"llama.cpp of xllamacpp {version('xllamacpp')}"
        params = xllamacpp.CommonParams()
        params.model.path = str(folder / file)
        params.embedding, params.warmup = True, False
        # A cache of each text by itself, or too small a batch, cuts texts that are served together into parts
        # that do not see one another: without a causal mask other vectors, and not a word.
        params.kv_unified, params.n_parallel = True, TOGETHER
        params.n_ctx = params.n_batch = params.n_ubatch = TOGETHER * limit
        self.server = xllamacpp.Server(params)

    def _tokens(self, text, reads_special, adds_special=True):
        content = {"content": text, "add_special": adds_special, "parse_special": reads_special}
        address, headers = f"{self.server.listening_address}/tokenize", {"Content-Type": "application/json"}
        request = urllib.request.Request(address, json.dumps(content).encode(), headers)
        with urllib.request.urlopen(request) as response:
            return json.loads(response.read().decode())["tokens"]

    def tokenize(self, text):
        ids = self._tokens(text, False)
        if len(ids) <= self.limit:
            return ids
        # Cut as tokenizer.json is: an end token stays.
        plain = self._tokens(text, False, adds_special=False)
        num_behind = len(ids) - len(plain) - (ids[: len(plain)] != plain)
        return ids[: self.limit - num_behind] + ids[len(ids) - num_behind :]

    def embed(self, texts):
        rows = [self.tokenize(text) for text in texts]
        is_plain = [row == self._tokens(text, True) for text, row in zip(texts, rows, strict=True)]
        given = [text if plain else row for text, row, plain in zip(texts, rows, is_plain, strict=True)]
        answer = self.server.handle_embeddings({"input": given})
        assert "error" not in answer, answer["error"]["message"]
        return np.array([item["embedding"] for item in answer["data"]], np.float32)


CONSUMERS: dict[str, Any] = {"onnxruntime": OnnxRuntime, "llama.cpp": LlamaCpp}


def in_parts(embed, texts, size, **how):
    return np.concatenate([embed(texts[i : i + size], **how) for i in range(0, len(texts), size)])


def main(name: str, folder: str, request_file: str, output: str) -> None:
    request, bert, settings = (
        json.loads(Path(folder, file).read_text(encoding="utf-8"))
        for file in (request_file, "sentence_bert_config.json", "config_sentence_transformers.json")
    )
    texts, limit, prompts = request["texts"], bert["max_seq_length"], settings["prompts"]
    prompted, long_text = texts[: request["num_prompted"]], texts[-1] * request["num_repeats"]
    consumer = CONSUMERS[name](Path(folder), request["file"], limit)
    rows = [consumer.tokenize(text) for text in (*texts, long_text)]
    found = {
        "version": np.array(consumer.version),
        "token_ids": np.array([i for row in rows for i in row], np.int64),
        "token_counts": np.array([len(row) for row in rows], np.int64),
        "alone_ND": in_parts(consumer.embed, texts, 1),
        "together_ND": in_parts(consumer.embed, texts, TOGETHER),
        "cut_1D": consumer.embed([long_text]),
    }
    for side, key in (("queries_MD", "query"), ("documents_MD", "document")):
        found[side] = in_parts(consumer.embed, [prompts.get(key, "") + text for text in prompted], TOGETHER)
    if name == "onnxruntime":
        found["left_padded_ND"] = in_parts(consumer.embed, texts, TOGETHER, left=True)
    np.savez(output, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
