"""Texts to vectors on all ranks, counted: what every task of an evaluation encodes by.

encoding = Encoding(encoder)                     # a world of one, or every rank of the process group
rows, lost = encoding.rows(["a text"], "query: ", 512, "query")
encoding.speed                                   # {"texts": 1, "tokens": 5, "seconds": ..., ...}
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from nemo_embed_core.encoders.protocol import TextEncoder
from nemo_embed_core.errors import UserError
from nemo_embed_core.parallel.layout import rank_from_env


def say(line: str) -> None:
    """On the first rank: all read and score the same."""
    if rank_from_env() == 0:
        print(line, flush=True)


class Encoding:
    """Each text is encoded on one rank and its row is on all, so that every rank scores all of a task alike.

    Every rank makes the same calls. num_texts, num_tokens: of all ranks (tokens None where the encoder
    cannot say them); seconds: from texts to rows, the exchange with it.
    """

    def __init__(self, encoder: TextEncoder):
        import torch
        import torch.distributed as dist

        self.encoder, self.digest = encoder, encoder.digest
        self.sample: Callable[[str, np.ndarray], None] | None = None  # is shown side and rows of all texts
        self.device = getattr(encoder, "device", torch.device("cpu"))
        self.group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if self.group is not None else (0, 1)
        self.reset()

    def reset(self) -> None:
        """Counts from 0, of the next task."""
        self.num_texts, self.seconds = 0, 0.0
        self.num_tokens: int | None = 0

    @property
    def speed(self) -> dict[str, float | int | None]:
        rate = self.num_texts / self.seconds if self.seconds else 0.0
        seconds = {"seconds": round(self.seconds, 3), "texts_per_s": round(rate, 1)}
        return {"texts": self.num_texts, "tokens": self.num_tokens, **seconds}

    def rows(
        self, texts: list[str], prompt: str, max_length: int, side: str
    ) -> tuple[np.ndarray, int | None]:
        """([len(texts), D] fp32 rows of prompt + text in the given order, how many lost tokens or None)."""
        start = time.perf_counter()
        order = np.array(sorted(range(len(texts)), key=lambda i: len(texts[i])), np.int64)
        own = np.sort(order[self.rank :: self.size])  # shares of like lengths
        vectors, lost, tokens = self._encode([texts[i] for i in own], prompt, max_length, side)
        if self.size > 1:
            vectors, lost, tokens = self._exchange(vectors, lost, tokens, order)
        self.num_texts += len(texts)
        self.num_tokens = None if tokens is None or self.num_tokens is None else self.num_tokens + tokens
        self.seconds += time.perf_counter() - start
        assert len(vectors) == len(texts), f"{len(texts)} texts, {len(vectors)} embeddings"
        bad = ~np.isfinite(vectors).all(axis=1)
        if bad.any():  # NaN would be sorted to the top
            raise UserError(
                f"{bad.sum()} of {len(texts)} {side} embeddings have NaN or infinite values, the first for "
                f"{texts[int(bad.argmax())][:60]!r}; the weights are broken, take an earlier checkpoint"
            )
        if self.sample is not None:
            self.sample(side, vectors)
        return vectors, lost

    def _encode(
        self, texts: list[str], prompt: str, max_length: int, side: str
    ) -> tuple[np.ndarray, int | None, int | None]:
        if not texts:  # more ranks than texts
            return np.zeros((0, self.encoder.hidden_size), np.float32), 0, 0
        tokenize = getattr(self.encoder, "tokenize", None)
        if tokenize is None:
            return self.encoder.encode(texts, prompt, max_length, side), None, None
        ids, lost = tokenize(texts, prompt, max_length)
        tokens = sum(map(len, ids))
        if hasattr(self.encoder, "encode_tokens"):
            return self.encoder.encode_tokens(ids), lost, tokens
        return self.encoder.encode(texts, prompt, max_length, side), lost, tokens

    def _exchange(
        self, vectors: np.ndarray, lost: int | None, tokens: int | None, order: np.ndarray
    ) -> tuple[np.ndarray, int | None, int | None]:
        """Every rank's rows in the order of the texts, and the sums of the counts."""
        import torch

        from nemo_embed_core.parallel.collectives import all_gather_rows, gather_objects

        most = -(-len(order) // self.size)
        padded_MD = torch.zeros(most, vectors.shape[1], device=self.device)
        padded_MD[: len(vectors)] = torch.from_numpy(vectors).to(self.device)
        gathered = all_gather_rows(padded_MD, self.group).cpu().numpy()
        rows = np.empty((len(order), vectors.shape[1]), np.float32)
        for rank in range(self.size):
            own = np.sort(order[rank :: self.size])
            rows[own] = gathered[rank * most : rank * most + len(own)]
        counts: list[tuple[Any, Any]] = gather_objects((lost, tokens))
        lost, tokens = (None if None in part else sum(part) for part in zip(*counts, strict=True))
        return rows, lost, tokens
