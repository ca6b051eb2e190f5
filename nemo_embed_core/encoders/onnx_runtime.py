"""A file onnx/*.onnx of an export as a TextEncoder, run by onnxruntime on the CPU: what is served, scored.

encoder = OnnxEncoder("exports/model/onnx/model_int8.onnx")
vectors = encoder.encode(["a text"])       # [1, D] fp32
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nemo_embed_core.data.tokenizer import load_tokenizer
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.durable import sha256_file

BATCH_TOKENS = 4096  # of a batch, padding with them


def is_onnx(name: str) -> bool:
    return name.endswith(".onnx") and Path(name).is_file()


class OnnxEncoder:
    """input_ids, attention_mask [N, L] -> unit rows [N, D]; tokenizer, prompts and lengths are the folder's.

    digest: of the file, what lies beside it for it, and the tokenizer.
    """

    def __init__(self, file: str | Path):
        try:
            import onnxruntime
        except ModuleNotFoundError:
            install = "pip install 'nemo_embed_core[serve]'"
            raise UserError(f"{file} needs onnxruntime: {install}") from None
        self.file = Path(file)
        self.tokenizer = load_tokenizer(self.file.parent.parent)
        try:
            options = {"providers": ["CPUExecutionProvider"]}
            self._session = onnxruntime.InferenceSession(str(self.file), **options)
        except Exception as error:  # of a library that has its own for each fault of a file
            raise UserError(f"{file} does not load in onnxruntime: {str(error).splitlines()[0]}") from None
        self.hidden_size = int(self._session.get_outputs()[0].shape[-1])
        beside = self.file.with_name(f"{self.file.name}.data")
        files = [file for file in (self.file, beside) if file.is_file()]
        known = [*map(sha256_file, files), self.tokenizer.digest]
        self.digest = hashlib.sha256("".join(known).encode()).hexdigest()

    def check_prompt(self, prompt: str, max_length: int, name: str) -> None:
        self.tokenizer.check_prompt(prompt, max_length, name)

    def tokenize(
        self, texts: Sequence[str], prompt: str = "", max_length: int = 512
    ) -> tuple[list[np.ndarray], int]:
        """(ids of prompt + text, cut at max_length, for each text; how many texts lost tokens)."""
        before = self.tokenizer.num_truncated
        tokens = self.tokenizer.encode(texts, max_length, prompt)
        return tokens, self.tokenizer.num_truncated - before

    def encode(
        self, texts: Sequence[str], prompt: str = "", max_length: int = 512, side: str | None = None
    ) -> np.ndarray:
        """[len(texts), D] fp32 rows of prompt + text, cut at max_length tokens, in the given order."""
        return self.encode_tokens(self.tokenize(texts, prompt, max_length)[0])

    def encode_tokens(self, tokens: list[np.ndarray]) -> np.ndarray:
        rows_ND = np.empty((len(tokens), self.hidden_size), np.float32)
        order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
        while order:
            longest = len(tokens[order[0]])
            batch, order = order[: max(1, BATCH_TOKENS // longest)], order[max(1, BATCH_TOKENS // longest) :]
            ids_NL, mask_NL = np.zeros((2, len(batch), longest), np.int64)
            for row, i in enumerate(batch):
                ids_NL[row, : len(tokens[i])], mask_NL[row, : len(tokens[i])] = tokens[i], 1
            inputs = {"input_ids": ids_NL, "attention_mask": mask_NL}
            rows_ND[batch] = self._session.run(["sentence_embedding"], inputs)[0]
        return rows_ND
