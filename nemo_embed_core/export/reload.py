"""What transformers and sentence-transformers make of a folder on the CPU, in a fresh process.

    python reload.py FOLDER REQUEST.json OUTPUT.npz

Imports nothing of this package, so that it sees the folder as any user does, and runs under transformers 4.51
to 5.x. REQUEST.json: {"texts", "num_prompted", "max_seq_length", "sets_length", "probe", "trust_remote_code",
"sentence_transformers", "pooling", "causal"}; the last text is the long one; sets_length: the folder
states no limit, so max_seq_length is set for it; pooling: as sentence-transformers calls it; causal: as
config.json says.

OUTPUT.npz holds, for N texts of D channels, M of them with prompts:

    case_names, first_state_changes   how much the first token's last state moves when the last token is
                                      replaced, for each way of attention and padding; 0: causal mask, NaN: no
                                      answer, and then nothing else is tried
    tokenizer_error                   why AutoTokenizer does not load, "" where it does; else nothing is tried
    token_ids, token_counts           of all texts in a row, and of the long one repeated until it must be cut
    num_repeats                       how often that is
    default_length                    tokens of the latter, cut where the tokenizer itself says
    transformers_ND                   fp32 unit rows of the model in fp32, padded on the right
    left_padded_ND                    the same padded on the left, all texts but the last
    and if the request wants sentence-transformers:
    st_token_ids, st_token_counts     as above, of the texts as it passes them to its tokenizer
    sentence_transformers_ND          rows of the model in fp32
    as_loaded_ND                      the same in the type in which sentence-transformers loads these weights
    queries_MD, documents_MD          what encode_query and encode_document give, or once prompt_name
    prompts, similarity               as sentence-transformers has them; JSON, text
"""

import json
import sys
from typing import Any

import numpy as np
import torch


def first_state_changes(model, ids: list[int], replacement: int) -> dict[str, float]:
    """{case: largest change of the first token's state when the last of `ids` becomes `replacement`}.

    Where the mask is causal it is exactly 0 at any precision: both forwards do the same arithmetic for that
    token. Each case goes another way through transformers: without padding it may leave the mask out, and
    sdpa then takes its causal one; a mask that was overridden for one of them is causal in the others.
    """
    before, after = torch.tensor([ids]), torch.tensor([[*ids[:-1], replacement]])
    changes = {}
    for attention in ("eager", "sdpa"):
        if hasattr(model, "set_attn_implementation"):
            model.set_attn_implementation(attention)
        else:  # transformers 4.51
            model.config._attn_implementation = attention
        cases = {"alone": (0, 0), "padded on the left": (3, 0), "padded on the right": (0, 3)}
        for case, (left, right) in cases.items():
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


def embeddings(model, tokenizer, texts: list[str], request: dict[str, Any], padding_side: str) -> np.ndarray:
    from sentence_transformers.models import Pooling

    tokenizer.padding_side = padding_side
    if tokenizer.pad_token is None:  # anybody's folder; which token it is does not matter, it is masked
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    how = {"padding": True, "truncation": True, "max_length": request["max_seq_length"]}
    batch = tokenizer(texts, return_tensors="pt", **how)
    hidden_NLD = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    pooling = Pooling(hidden_NLD.shape[-1], pooling_mode=request["pooling"])
    pooled_ND = pooling({"token_embeddings": hidden_NLD, "attention_mask": batch["attention_mask"]})[
        "sentence_embedding"
    ]
    return torch.nn.functional.normalize(pooled_ND, dim=-1).numpy()


def flat(prefix: str, rows: list[list[int]]) -> dict[str, np.ndarray]:
    ids = np.array([i for row in rows for i in row], dtype=np.int64)
    counts = np.array([len(row) for row in rows], dtype=np.int64)
    return {f"{prefix}token_ids": ids, f"{prefix}token_counts": counts}


def sentence_transformers(folder: str, request: dict[str, Any], long_text: str) -> dict[str, Any]:
    from sentence_transformers import SentenceTransformer, __version__

    texts, trusted = request["texts"], request["trust_remote_code"]
    prompted = texts[: request["num_prompted"]]
    encoder = SentenceTransformer(folder, device="cpu", trust_remote_code=trusted)
    if encoder.tokenizer.pad_token is None:
        encoder.tokenizer.pad_token = encoder.tokenizer.eos_token or encoder.tokenizer.bos_token
    if request["sets_length"]:
        encoder.max_seq_length = request["max_seq_length"]
    how = {"batch_size": 4, "convert_to_numpy": True, "show_progress_bar": False}
    as_loaded_ND = encoder.encode(texts, prompt="", **how)
    encoder = encoder.float()
    tokenize = getattr(encoder, "preprocess", None) or encoder.tokenize
    return {
        **flat("st_", [tokenize([text])["input_ids"][0].tolist() for text in (*texts, long_text)]),
        "as_loaded_ND": as_loaded_ND.astype(np.float32),
        "sentence_transformers_ND": encoder.encode(texts, prompt="", **how).astype(np.float32),
        **{
            f"{name}_MD": getattr(encoder, f"encode_{side}")(prompted, **how).astype(np.float32)
            if hasattr(encoder, f"encode_{side}")
            else encoder.encode(prompted, prompt=encoder.prompts.get(side, ""), **how).astype(np.float32)
            for name, side in (("queries", "query"), ("documents", "document"))
        },
        "prompts": np.array(json.dumps(encoder.prompts)),
        "similarity": np.array(str(getattr(encoder.similarity_fn_name, "value", encoder.similarity_fn_name))),
        "sentence_transformers_version": np.array(__version__),
    }


def main(folder: str, request_file: str, output: str) -> None:
    import transformers
    from transformers import AutoModel, AutoTokenizer

    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    texts, max_seq_length, trusted = request["texts"], request["max_seq_length"], request["trust_remote_code"]
    try:
        tokenizer, tokenizer_error = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted), ""
    except Exception as error:
        # Whether the model is causal needs no tokenizer.
        tokenizer, tokenizer_error = None, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    # fp32 whatever the weights are: what then differs from our encoder is a fault and no rounding.
    model = AutoModel.from_pretrained(folder, trust_remote_code=trusted).eval().float()

    token_ids = [list(range(12))]  # which surely exist
    if tokenizer is not None:
        cut = {"truncation": True, "max_length": max_seq_length}
        token_ids = [tokenizer(text, **cut)["input_ids"] for text in texts]
    # A short text, so that even a wide model's attention gives the last token a weight that shows.
    probe = token_ids[request["probe"] if tokenizer is not None else 0]
    replacement = next(i for row in token_ids for i in row if i != probe[-1])
    with torch.no_grad():
        changes = first_state_changes(model, probe, replacement)
        found: dict[str, Any] = {
            "case_names": np.array(list(changes)),
            "first_state_changes": np.array(list(changes.values())),
            "tokenizer_error": np.array(tokenizer_error),
            "transformers_version": np.array(transformers.__version__),
        }
        is_as_said = max(changes.values()) == 0 if request["causal"] else min(changes.values()) > 0
        if not is_as_said or tokenizer is None:
            np.savez(output, **found)
            return
        num_repeats = max_seq_length // (len(tokenizer(texts[-1])["input_ids"]) // 2) + 2
        long_text = texts[-1] * num_repeats
        token_ids.append(tokenizer(long_text, **cut)["input_ids"])
        found |= flat("", token_ids)
        found["num_repeats"] = np.array(num_repeats)
        found["default_length"] = np.array(len(tokenizer(long_text, truncation=True)["input_ids"]))
        left_ND = embeddings(model, tokenizer, texts[:-1], request, "left")
        # The long one apart, so that the others need not be padded to its length.
        parts = [embeddings(model, tokenizer, part, request, "right") for part in (texts[:-1], texts[-1:])]
        found |= {"transformers_ND": np.concatenate(parts), "left_padded_ND": left_ND}
    del model  # one copy of the weights at a time
    np.savez(output, **found)  # what stands, should the folder not load in the next one
    if request["sentence_transformers"]:
        np.savez(output, **found, **sentence_transformers(folder, request, long_text))


if __name__ == "__main__":
    main(*sys.argv[1:])
