"""Under any transformers: the flash-attention path of a folder with remote code, its kernel replaced by plain
torch.

    python flash_stand_in.py FOLDER            prints {"max_abs_diff", "is_causal", "num_calls"}

No flash-attn and no GPU needed: what is proven is what the kernel is told (2-D mask or none, is_causal), by
comparing the states of real tokens with eager attention's.
"""

import json
import sys

import torch
from transformers import AutoModel
from transformers.integrations import flash_attention

CALLS = []


def plain(query, key, value, attention_mask, query_length, is_causal, dropout=0.0, softmax_scale=None, **_):
    """[N, L, heads, head_dim] in and out; attention_mask [N, L] or None: nothing is padding."""
    CALLS.append(bool(is_causal))
    num_groups = query.shape[2] // key.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    allowed = torch.ones(query_length, query_length, dtype=torch.bool)
    allowed = (allowed.tril() if is_causal else allowed)[None, None]
    if attention_mask is not None:
        assert attention_mask.dim() == 2, attention_mask.shape
        allowed = allowed & attention_mask[:, None, None, :].bool()
    key, value = (x.repeat_interleave(num_groups, dim=1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * softmax_scale).masked_fill(~allowed, torch.finfo(query.dtype).min)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


def main(folder: str) -> None:
    flash_attention._flash_attention_forward = plain
    model = (
        AutoModel.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager").eval().float()
    )
    input_ids = torch.arange(3, 3 + 30).reshape(3, 10)
    difference = 0.0
    for lengths, side in (((10, 10, 10), "none"), ((10, 7, 4), "left"), ((10, 7, 4), "right")):
        mask = torch.arange(10)[None, :] < torch.tensor(lengths)[:, None]
        mask = mask.flip(1) if side == "left" else mask
        states = []
        for attention in ("eager", "flash_attention_2"):
            model.config._attn_implementation = attention
            with torch.no_grad():
                states.append(model(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state[mask])
        difference = max(difference, float((states[0] - states[1]).abs().max()))
    print(json.dumps({"max_abs_diff": difference, "is_causal": any(CALLS), "num_calls": len(CALLS)}))


if __name__ == "__main__":
    main(sys.argv[1])
