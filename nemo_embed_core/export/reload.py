"""Run in a fresh process by verify.py: what transformers and sentence-transformers make of a folder, on the CPU.

    python reload.py FOLDER REQUEST.json OUTPUT.npz

Imports nothing of this package, so that it sees the folder as any user does, and runs under transformers 4.51 to 5.x.
REQUEST.json: {"texts", "max_seq_length", "probe", "trust_remote_code"}; the last text is the long one. OUTPUT.npz holds, for
N texts of D channels:

    case_names, first_state_changes   how much the first token's last hidden state moves when the last token is replaced, for
                                      each way of attention and padding; 0: causal mask, and then nothing else is tried
    transformers_ND                   fp32 unit rows of the model in fp32, padded on the right
    left_padded_ND                    the same padded on the left, all texts but the last
    sentence_transformers_ND          fp32 unit rows of the model in fp32
    as_loaded_ND                      the same in the type in which sentence-transformers loads these weights
    token_ids, token_counts_N         all texts in a row
"""

import json
import sys
from typing import Any

import numpy as np
import torch


def first_state_changes(model, ids: list[int], replacement: int) -> dict[str, float]:
    """{case: largest change of the first token's state when the last of `ids` becomes `replacement`}.

    Where the mask is causal it is exactly 0 at any precision: both forwards do the same arithmetic for that token. Each
    case goes another way through transformers: without padding it may leave the mask out, and sdpa then takes its causal
    one; a mask that was overridden for one of them is causal in the others.
    """
    before, after = torch.tensor([ids]), torch.tensor([[*ids[:-1], replacement]])
    changes = {}
    for attention in ("eager", "sdpa"):
        if hasattr(model, "set_attn_implementation"):
            model.set_attn_implementation(attention)
        else:  # transformers 4.51
            model.config._attn_implementation = attention
        for case, left, right in (("alone", 0, 0), ("padded on the left", 3, 0), ("padded on the right", 0, 3)):
            states = []
            for row in (before, after):
                padded = torch.nn.functional.pad(row, (left, right), value=ids[0])
                mask = torch.nn.functional.pad(torch.ones_like(row), (left, right))
                states.append(model(input_ids=padded, attention_mask=mask).last_hidden_state[0, left])
            changes[f"{attention}, {case}"] = float((states[0] - states[1]).abs().max())
        # What a caller gets who has nothing to mask and says so by giving no mask.
        states = [model(input_ids=row).last_hidden_state[0, 0] for row in (before, after)]
        changes[f"{attention}, without a mask"] = float((states[0] - states[1]).abs().max())
    return changes


def embeddings(model, tokenizer, texts: list[str], max_seq_length: int, padding_side: str) -> np.ndarray:
    tokenizer.padding_side = padding_side
    batch = tokenizer(texts, padding=True, truncation=True, max_length=max_seq_length, return_tensors="pt")
    hidden_NLD = model(**batch).last_hidden_state
    mask_NL1 = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden_NLD * mask_NL1).sum(1) / mask_NL1.sum(1), dim=-1).numpy()


def main(folder: str, request_file: str, output: str) -> None:
    import transformers
    from transformers import AutoModel, AutoTokenizer

    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    texts, max_seq_length, trusted = request["texts"], request["max_seq_length"], request["trust_remote_code"]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    # fp32 whatever the weights are: what then differs from our encoder is a fault and no rounding.
    model = AutoModel.from_pretrained(folder, trust_remote_code=trusted).eval().float()

    token_ids = [tokenizer(text, truncation=True, max_length=max_seq_length)["input_ids"] for text in texts]
    # A short text, so that even a wide model's attention gives the last token a weight that shows; ids that surely exist.
    probe = token_ids[request["probe"]]
    replacement = next(i for row in token_ids for i in row if i != probe[-1])
    with torch.no_grad():
        changes = first_state_changes(model, probe, replacement)
        found: dict[str, Any] = {
            "case_names": np.array(list(changes)),
            "first_state_changes": np.array(list(changes.values())),
            "transformers_version": np.array(transformers.__version__),
        }
        if min(changes.values()) == 0:
            np.savez(output, **found)
            return
        right_ND = embeddings(model, tokenizer, texts, max_seq_length, "right")
        left_ND = embeddings(model, tokenizer, texts[:-1], max_seq_length, "left")
    del model  # one copy of the weights at a time

    from sentence_transformers import SentenceTransformer
    from sentence_transformers import __version__ as sentence_transformers_version

    encoder = SentenceTransformer(folder, device="cpu", trust_remote_code=trusted)
    as_loaded_ND = encoder.encode(texts, prompt="", convert_to_numpy=True, show_progress_bar=False)
    vectors_ND = encoder.float().encode(texts, prompt="", convert_to_numpy=True, show_progress_bar=False)
    np.savez(
        output,
        **found,
        transformers_ND=right_ND,
        left_padded_ND=left_ND,
        sentence_transformers_ND=vectors_ND.astype(np.float32),
        as_loaded_ND=as_loaded_ND.astype(np.float32),
        token_ids=np.array([i for row in token_ids for i in row], dtype=np.int64),
        token_counts_N=np.array([len(row) for row in token_ids], dtype=np.int64),
        sentence_transformers_version=np.array(sentence_transformers_version),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
