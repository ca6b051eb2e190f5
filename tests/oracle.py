"""Training steps that share no line with the product: Hugging Face's model, and loss, clipping, schedule and
AdamW as formulas.

    oracle = Oracle(folder, torch.float64)                  # of a folder that write_model made
    step = oracle.step(batch, options, number)          # Step(losses, hits, norm, gradients), weights updated
    oracle.weights()                                        # {Hugging Face name: tensor}

Imports nothing of nemo_embed_core: what product and oracle share, a comparison cannot see.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 6, "rms_norm_eps": 3e-3, "max_position_embeddings": 512, "is_causal": False,
    "use_cache": False,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    },
}  # fmt: skip


def write_model(
    folder: Path,
    vocab_size: int,
    intermediate_size: int,
    dtype: torch.dtype = torch.float64,
    model_type: str = "llama",
    **shape: Any,
) -> Path:
    """A Hugging Face folder of random weights; norms are not ones, which would hide one that is ignored."""
    from transformers import AutoConfig, AutoModel

    sizes = {"vocab_size": vocab_size, "intermediate_size": intermediate_size}
    config = AutoConfig.for_model(model_type, **sizes, **(SHAPE | shape))
    model = AutoModel.from_config(config).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.copy_(0.15 * noise if p.ndim > 1 else 1 + 0.3 * noise.tanh())
    model.to(dtype).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Batch:
    """A global batch: token ids of B queries and of the documents that they bring, document 0 of a row its
    positive."""

    queries: list[list[int]]
    documents: list[list[int]]  # [B][1 + K] ids; -1: this row has fewer negatives
    tokens: dict[int, list[int]]  # of each document
    known: list[set[tuple[int, ...]]]  # [B] token ids of all documents that are right for the row
    scores: list[dict[tuple[int, ...], float]]  # [B] a teacher's, of documents by their token ids
    # [B] a teacher's, of the query and of each document that is there, in order
    vectors: list[list[Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    losses: Tensor  # [B]
    scores: list[Tensor]  # [B] cosines of the row's candidates, its positive first
    norm: float  # before clipping
    gradients: dict[str, Tensor]  # Hugging Face name -> after clipping
    temperature: float  # of this step
    terms: dict[str, float]  # mean loss of each, by name
    projection: tuple[Tensor, Tensor] | None  # gradient in this step, and value after it


class Oracle:
    def __init__(self, folder: Path, dtype: torch.dtype, pooling: str = "mean"):
        # Here and not above: test modules are imported by every rank, which needs a Batch at most.
        from transformers import AutoModel

        self.model = AutoModel.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        self.pooling = pooling
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.count = 0
        self.log_temperature: Tensor | None = None  # learned
        self.projection: Tensor | None = None  # learned
        if dtype == torch.float64:  # transformers computes norms and angles in fp32 whatever the weights are
            self.model.rotary_emb.forward = self._angles
            for module in self.model.modules():
                if type(module).__name__.endswith("RMSNorm"):
                    module.forward = lambda x, m=module: (
                        m.weight * x / (x.pow(2).mean(-1, keepdim=True) + m.variance_epsilon).sqrt()
                    )

    def _angles(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        rope, A = self.model.config.rope_parameters, self.model.config.head_dim
        frequencies = []
        for i in range(0, A, 2):
            frequency = rope["rope_theta"] ** (-i / A)
            if rope["rope_type"] == "llama3":
                turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
                share = (turns - rope["low_freq_factor"]) / (
                    rope["high_freq_factor"] - rope["low_freq_factor"]
                )
                share = min(1.0, max(0.0, share))
                frequency *= share + (1 - share) / rope["factor"]
            frequencies.append(frequency)
        angles = position_ids[..., None] * torch.tensor(frequencies * 2, dtype=torch.float64)
        return angles.cos(), angles.sin()

    def trained(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.model.named_parameters()}

    def weights(self) -> dict[str, Tensor]:
        return {name: p.clone() for name, p in self.trained().items()}

    def embed(self, texts: list[list[int]]) -> Tensor:
        """[N, D] of each text's tokens, weighted by the pooling, unit length; in fp32 or wider."""
        ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
        mask, weights = torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.float64)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
            n = len(text)
            weights[row, :n] = {
                "mean": torch.ones(n), "last": 1.0 * (torch.arange(n) == n - 1),
                "cls": 1.0 * (torch.arange(n) == 0), "weightedmean": torch.arange(n) + 1.0,
            }[self.pooling]  # fmt: skip
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        mean = torch.einsum("nld,nl->nd", hidden, (weights / weights.sum(1, keepdim=True)).to(hidden.dtype))
        return mean / mean.norm(dim=1, keepdim=True)

    def losses(self, batch: Batch, loss: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
        """(loss of each row [B], the cosines of its positive and its candidates); one row at a time."""
        ids = sorted(batch.tokens)
        rows = self.embed(batch.queries + [batch.tokens[i] for i in ids])
        temperature: Any = loss["temperature"]
        if loss.get("temperature_lr"):
            if self.log_temperature is None:
                self.log_temperature = torch.tensor(math.log(temperature), dtype=rows.dtype)
                self.log_temperature.requires_grad_()
            temperature = self.log_temperature.exp()
        q, documents = rows[: len(batch.queries)], dict(zip(ids, rows[len(batch.queries) :], strict=True))
        scores = [self._scores(b, batch, q, documents, loss) for b in range(len(q))]
        dims = loss.get("matryoshka_dims") or [rows.shape[1]]
        weights = loss.get("matryoshka_weights") or [1.0] * len(dims)
        total, self.terms = torch.zeros(len(q), dtype=rows.dtype), {}
        for dim, weight in zip(dims, weights, strict=True):
            cut = [x[..., :dim] / x[..., :dim].norm(dim=-1, keepdim=True) for x in (q, *documents.values())]
            narrow = dict(zip(documents, cut[1:], strict=True))
            own = [self._scores(b, batch, cut[0], narrow, loss) / temperature for b in range(len(q))]
            losses = torch.stack([torch.logsumexp(s, 0) - s[0] for s in own])
            told = f"@{dim}" if "matryoshka_dims" in loss else ""
            self.terms[f"info_nce{told}"] = losses.mean().item()
            total = total + weight * loss.get("info_nce_weight", 1.0) * losses
            for name in ("kl", "margin_mse"):
                if own_weight := loss.get(f"{name}_weight"):
                    found = [
                        self._distilled(name, b, batch, cut[0], narrow, loss, temperature)
                        for b in range(len(q))
                    ]
                    rows_with = [x for x in found if x is not None]
                    self.terms[f"{name}{told}"] = torch.stack(rows_with).mean().item()
                    total = total + weight * own_weight * torch.stack(
                        [0 * losses[0] if x is None else x for x in found]
                    )
            if own_weight := loss.get("teacher_vectors_weight"):
                far = torch.stack([self._far(b, batch, cut[0], narrow) for b in range(len(q))])
                self.terms[f"teacher_vectors{told}"] = far.mean().item()
                total = total + weight * own_weight * far
        return total, [s.detach() for s in scores]

    def _far(self, b: int, batch: Batch, q: Tensor, documents: dict[int, Tensor]) -> Tensor:
        """1 less the cosine of a projected text and the teacher's vector, over the texts of row b."""
        own = [q[b], *(documents[d] for d in batch.documents[b] if d >= 0)]
        if self.projection is None:
            width, hidden = len(batch.vectors[b][0]), self.model.config.hidden_size
            start = [[float(i == j) for j in range(hidden)] for i in range(width)]
            self.projection = torch.tensor(start, dtype=q.dtype, requires_grad=True)
        total = torch.zeros((), dtype=q.dtype)
        for e, t in zip(own, batch.vectors[b], strict=True):
            y = sum(self.projection[:, j] * e[j] for j in range(len(e)))
            total = total + 1 - (y @ t) / (y @ y).sqrt() / (t @ t).sqrt()
        return total / len(own)

    @staticmethod
    def _distilled(
        name: str, b: int, batch: Batch, q: Tensor, documents: dict[int, Tensor], loss: dict[str, Any],
        temperature: Any,
    ) -> Tensor | None:  # fmt: skip
        """Of row b; None where the teacher says nothing of its positive or of all its negatives."""
        own, known = batch.documents[b], batch.known[b] | {tuple(batch.tokens[batch.documents[b][0]])}
        told = batch.scores[b]
        negatives = [d for d in own[1:] if d >= 0 and tuple(batch.tokens[d]) not in known]
        kept = [d for d in (own[0], *negatives) if tuple(batch.tokens[d]) in told]
        if own[0] not in kept or len(kept) < 2:
            return None
        student = [q[b] @ documents[d] for d in kept]
        teacher = [told[tuple(batch.tokens[d])] for d in kept]
        if name == "margin_mse":
            margins = [
                (student[0] - s, teacher[0] - t) for s, t in zip(student[1:], teacher[1:], strict=True)
            ]
            return sum((s - t) ** 2 for s, t in margins) / len(margins)
        weights = [math.exp((t - max(teacher)) / loss.get("kl_temperature", 0.02)) for t in teacher]
        p = [w / sum(weights) for w in weights]
        log_z = torch.logsumexp(torch.stack(student) / temperature, 0)
        return sum(a * (math.log(a) - s / temperature + log_z) for a, s in zip(p, student, strict=True) if a)

    @staticmethod
    def _scores(
        b: int, batch: Batch, q: Tensor, documents: dict[int, Tensor], loss: dict[str, Any]
    ) -> Tensor:
        """The positive's cosine, then those of all that row b is contrasted with."""
        in_batch, own = loss["in_batch"], batch.documents[b]

        def usable(d: int) -> bool:
            return d >= 0 and tuple(batch.tokens[d]) not in batch.known[b] | {tuple(batch.tokens[own[0]])}

        positive = q[b] @ documents[own[0]]
        found = [q[b] @ documents[d] for d in own[1:] if usable(d)]
        own_texts = [batch.tokens[d] for d in own if d >= 0]
        for other, theirs in enumerate(batch.documents):
            if other == b:
                continue
            theirs = [d for d in (theirs if in_batch == "all" else theirs[:1]) if usable(d)]
            if in_batch != "none":
                found += [q[b] @ documents[d] for d in theirs]
            if loss.get("query_query") and usable(batch.documents[other][0]):
                found.append(q[b] @ q[other])
            if loss.get("document_document"):
                far = [d for d in theirs if batch.tokens[d] not in own_texts]
                found += [documents[own[0]] @ documents[d] for d in far]
        margin = loss.get("false_negative_margin")
        return torch.stack([positive, *(s for s in found if margin is None or s <= positive + margin)])

    def step(
        self, batch: Batch, number: int, steps: int, loss: dict[str, Any], optim: dict[str, Any]
    ) -> Step:
        """Step `number` of 0, 1, ..., steps - 1, with the options under their names in a training
        configuration."""
        self.model.zero_grad()
        trained = self.trained()
        losses, scores = self.losses(batch, loss)
        losses.mean().backward()
        learned = self.log_temperature
        temperature = loss["temperature"] if learned is None else learned.exp().item()
        gradients = self.gradients()
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
        if optim["clip_norm"] > 0 and norm > optim["clip_norm"]:
            for g in gradients.values():
                g *= optim["clip_norm"] / (norm + 1e-6)
        rate = base_rate = self._rate(number, steps, optim)
        self.count += 1
        for name, p in trained.items():
            self._adamw(name, p, gradients[name], rate, optim["weight_decay"] if p.ndim > 1 else 0.0, optim)
        if learned is not None:
            rate *= loss["temperature_lr"] / optim["lr"]
            self._adamw("temperature", learned, learned.grad, rate, 0.0, optim)
            learned.grad = None
            with torch.no_grad():
                learned.clamp_(math.log(0.005), 0.0)
        projection = None
        if (w := self.projection) is not None:
            self._adamw(
                "projection", w, w.grad, base_rate * loss["teacher_vectors_lr"] / optim["lr"], 0.0, optim
            )
            projection, w.grad = (w.grad, w.detach().clone()), None
        kept = {name: g.clone() for name, g in gradients.items()}
        return Step(losses.detach(), scores, norm, kept, temperature, self.terms, projection)

    @staticmethod
    def _rate(number: int, steps: int, optim: dict[str, Any]) -> float:
        """Linear up to lr, which the last step of the warm-up has, then linear down to min_lr one step after
        the last."""
        lr, low, warmup = optim["lr"], optim["min_lr"], optim["warmup_steps"]
        if number < warmup:
            return lr * (number + 1) / warmup
        return lr - (lr - low) * (number - warmup) / (steps - warmup)

    @torch.no_grad()
    def _adamw(self, name: str, p: Tensor, g: Tensor, lr: float, decay: float, optim: dict[str, Any]) -> None:
        """arXiv:1711.05101, algorithm 2, decay times lr; only matrices decay."""
        beta1, beta2 = optim["beta1"], optim["beta2"]
        m, v = self.moments.get(name, (torch.zeros_like(p), torch.zeros_like(p)))
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        self.moments[name] = m, v
        m, v = m / (1 - beta1**self.count), v / (1 - beta2**self.count)
        p -= lr * (decay * p + m / (v.sqrt() + optim["eps"]))


# Linear layers that share a mask, in the order in which a block runs them.
MASKED = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class LowRank(Oracle):
    """LoRA as the projection of a dense run: of the gradient dW of W = W0 + s B A by autograd,

        dA = s B^T dW, summed over the weights that share A      dB = s dW A^T

    factors: layers.0.mlp.gate_up_proj/A, which its gate and up share, and layers.0.mlp.gate_proj.weight/B.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, factors: dict[str, Tensor], scale: float):
        super().__init__(folder, dtype)
        self.factors, self.scale = {name: x.clone() for name, x in factors.items()}, scale
        self.base = dict(self.model.named_parameters())
        self.start = {name: p.detach().clone() for name, p in self.base.items()}

    def _pairs(self) -> list[tuple[str, str, str]]:
        """(weight, its A, its B)."""
        found = []
        for name in self.factors:
            if name.endswith("/B"):
                layer, _, kind = name.removesuffix(".weight/B").rpartition(".")
                own = next((fused for fused, parts in FUSED.items() if kind in parts), kind)
                found.append((name.removesuffix("/B"), f"{layer}.{own}/A", name))
        return found

    def losses(self, batch: Batch, loss: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
        with torch.no_grad():
            for weight, a, b in self._pairs():
                folded = self.start[weight] + self.scale * self.factors[b] @ self.factors[a]
                self.base[weight].copy_(folded)
        return super().losses(batch, loss)

    def trained(self) -> dict[str, Tensor]:
        return self.factors

    def gradients(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for weight, a, b in self._pairs():
            dense = self.base[weight].grad
            found[b] = self.scale * dense @ self.factors[a].T
            found[a] = found.get(a, 0.0) + self.scale * self.factors[b].T @ dense
        return found


def mixed(x: np.ndarray) -> np.ndarray:
    """fmix32 of MurmurHash3, of words in uint64."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor) % np.uint64(2**32)
    return x ^ (x >> np.uint64(16))


def hashed(*values: Any) -> np.ndarray:
    """Of 0, then with each value in turn: mixed(key ^ mixed(value + 0x9E3779B9))."""
    key = np.uint64(0)
    for value in values:
        word = np.asarray(value).astype(np.uint64)
        key = mixed(key ^ mixed((word + np.uint64(0x9E3779B9)) % np.uint64(2**32)))
    return key


class Dropped(LowRank):
    """LoRA with dropout: W x + s B A (mask x / (1 - rate)), weight by weight, and its gradients by autograd.

    A value is dropped where hashed(seed, step, text, position, layer, column) < rate 2^32; a text is the sum
    of hashed(position, id) over its tokens, mod 2^32.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, factors: dict[str, Tensor], scale: float, rate: float,
        seed: int,
    ):  # fmt: skip
        super().__init__(folder, dtype, factors, scale)
        self.rate, self.seed = rate, seed
        for factor in self.factors.values():
            factor.requires_grad_()
        for weight, a, b in self._pairs():
            name = weight.removesuffix(".weight")
            place = next(i for i, kinds in enumerate(MASKED) if name.rpartition(".")[2] in kinds)
            layer = len(MASKED) * int(name.split(".")[1]) + place
            linear = self.model.get_submodule(name)
            linear.forward = self._forward(linear, layer, a, b)

    def _forward(self, linear: torch.nn.Linear, layer: int, a: str, b: str) -> Any:
        def forward(x: Tensor) -> Tensor:
            u = hashed(self.seed, self.number, self.texts[..., None], self.positions[..., None], layer,
                       np.arange(x.shape[-1]))  # fmt: skip
            x_kept = x * torch.from_numpy(u >= int(self.rate * 2**32)) / (1 - self.rate)
            y = torch.nn.functional.linear(x, linear.weight, linear.bias)
            return y + self.scale * (x_kept @ self.factors[a].T) @ self.factors[b].T

        return forward

    def embed(self, texts: list[list[int]]) -> Tensor:
        sums = [hashed(range(len(text)), text).sum() % 2**32 for text in texts]
        self.texts = np.array(sums)[:, None]
        self.positions = np.arange(max(map(len, texts)))[None]
        return Oracle.embed(self, texts)

    def step(self, batch: Batch, number: int, *options: Any) -> Step:
        self.number = number
        for factor in self.factors.values():
            factor.grad = None
        return super().step(batch, number, *options)

    def losses(self, batch: Batch, loss: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
        return Oracle.losses(self, batch, loss)

    def trained(self) -> dict[str, Tensor]:
        return {name: factor.detach() for name, factor in self.factors.items()}

    def gradients(self) -> dict[str, Tensor]:
        return {name: factor.grad for name, factor in self.factors.items()}
