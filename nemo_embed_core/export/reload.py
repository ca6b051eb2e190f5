"""Run in a fresh process by verify.py: what transformers and sentence-transformers make of a folder, on the CPU.

    python reload.py FOLDER TEXTS.json OUTPUT.npz

Imports nothing of this package, so that it sees the folder as any user does. OUTPUT.npz holds, for N texts of D channels:
transformers_ND, sentence_transformers_ND (fp32 unit rows), token_ids (all texts in a row) with token_counts_N, and
first_state_change (how much the first token's last hidden state moves when the last token is replaced; 0: causal mask, and
then nothing else is tried).
"""

import json
import sys

import numpy as np


def main(folder: str, texts_file: str, output: str) -> None:
    import torch
    import transformers
    from transformers import AutoModel, AutoTokenizer

    with open(texts_file, encoding="utf-8") as file:
        request = json.load(file)
    texts, max_seq_length = request["texts"], request["max_seq_length"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()

    token_ids = [tokenizer(text, truncation=True, max_length=max_seq_length)["input_ids"] for text in texts]
    # A short text, so that even a wide model's attention gives the last token a weight that shows; ids that surely exist.
    before = torch.tensor([token_ids[request["probe"]]])
    after = before.clone()
    after[0, -1] = next(i for row in token_ids for i in row if i != before[0, -1])
    with torch.no_grad():
        first_states = [model(input_ids=ids).last_hidden_state[0, 0].float() for ids in (before, after)]
        change = (first_states[0] - first_states[1]).abs().max().numpy()
        version = np.array(transformers.__version__)
        if change == 0:
            np.savez(output, first_state_change=change, transformers_version=version)
            return
        batch = tokenizer(texts, padding=True, truncation=True, max_length=max_seq_length, return_tensors="pt")
        hidden_NLD = model(**batch).last_hidden_state.float()
    mask_NL1 = batch["attention_mask"][..., None]
    pooled_ND = torch.nn.functional.normalize((hidden_NLD * mask_NL1).sum(1) / mask_NL1.sum(1), dim=-1)
    del model, hidden_NLD  # one copy of the weights at a time

    from sentence_transformers import SentenceTransformer
    from sentence_transformers import __version__ as sentence_transformers_version

    encoder = SentenceTransformer(folder, device="cpu")
    vectors_ND = encoder.encode(texts, prompt="", convert_to_numpy=True, show_progress_bar=False)
    np.savez(
        output,
        transformers_ND=pooled_ND.numpy(),
        sentence_transformers_ND=vectors_ND.astype(np.float32),
        token_ids=np.array([i for row in token_ids for i in row], dtype=np.int64),
        token_counts_N=np.array([len(row) for row in token_ids], dtype=np.int64),
        first_state_change=change,
        sentence_transformers_version=np.array(sentence_transformers_version),
        transformers_version=version,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
