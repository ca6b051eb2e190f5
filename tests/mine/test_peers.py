"""Files that mining writes, through the loaders of the programs that they are for; `make peers` installs
these. Documents in an example are those of one row, with the row's prompts and scores."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
import types
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from nemo_embed_core.config import DataConfig, DatasetConfig
from nemo_embed_core.data.prepare import write_datasets
from nemo_embed_core.mine.formats import convert

ROWS = [
    {"query": f"w{i} über\nw{i + 1}", "pos": [f"p{i} \u2028a", f"q{i}"][: 1 + i % 2],
     "neg": [f"n{j} of w{i}" for j in range(1 + i % 3)]}
    for i in range(7)
]  # fmt: skip
for i, row in enumerate(ROWS):
    row["pos_scores"] = [0.9 - 0.01 * i - 0.001 * j for j in range(len(row["pos"]))]
    row["neg_scores"] = [0.5 - 0.01 * i - 0.001 * j for j in range(len(row["neg"]))]
PROMPT, DOCUMENT_PROMPT = "Instruct: find\nQuery: ", "Read "


def of_row(i: int) -> tuple[str, dict[str, float], dict[str, float]]:
    """Query, and score by document of both sides, with prompts."""
    row = ROWS[i]
    pos, neg = (
        {DOCUMENT_PROMPT + text: score for text, score in zip(row[side], row[f"{side}_scores"], strict=True)}
        for side in ("pos", "neg")
    )
    return PROMPT + row["query"], pos, neg


@pytest.fixture
def written(tmp_path, monkeypatch):
    """written(format, suffix): the file."""
    import datasets

    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setattr(datasets.config, name, tmp_path / name)
    mined = tmp_path / "mined.jsonl"
    mined.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def write(form: str, name: str, num_negatives: int = 1) -> Path:
        (tmp_path / form).mkdir()
        how = {"num_negatives": num_negatives, "prompt": PROMPT, "document_prompt": DOCUMENT_PROMPT}
        assert convert(mined, tmp_path / form / name, form, **how)["rows"] > 0
        return tmp_path / form / name

    return write


class Letters:
    """A tokenizer whose ids say the text again."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [ord(letter) for letter in text]

    def encode_plus(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))


def need(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: make peers")


# ------------------------------------------------------------------------------------------ FlagEmbedding


def flagembedding(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its module of datasets, without its packages' own code, which imports models of older transformers."""
    need("FlagEmbedding")
    (root,) = importlib.util.find_spec("FlagEmbedding").submodule_search_locations
    name = "FlagEmbedding"
    for part in ("", "abc", "finetune", "embedder"):
        root, name = (f"{root}/{part}", f"{name}.{part}") if part else (root, name)
        package = types.ModuleType(name)
        package.__path__ = [root]
        monkeypatch.setitem(sys.modules, name, package)
    return importlib.import_module(f"{name}.AbsDataset")


@pytest.mark.parametrize("instruction", [None, "Represent this: "])
@pytest.mark.parametrize("same_dataset", [False, True])
def test_flagembedding_makes_our_rows(written, monkeypatch, instruction, same_dataset):
    theirs = flagembedding(monkeypatch)
    arguments = importlib.import_module(f"{theirs.__package__}.AbsArguments").AbsEmbedderDataArguments(
        train_data=[str(written("flagembedding", "mined.jsonl"))],
        train_group_size=3,
        query_instruction_for_retrieval=instruction,
        knowledge_distillation=True,
    )
    if same_dataset:
        data = theirs.AbsEmbedderSameDatasetTrainDataset(arguments, len(ROWS), 0, None)
        queries, passages, scores, *_ = data[0]
    else:
        data = theirs.AbsEmbedderTrainDataset(arguments, None)
        queries, passages, scores = zip(*(data[i] for i in range(len(data))), strict=True)
        passages, scores = ([*chain.from_iterable(part)] for part in (passages, scores))
    assert sorted(queries) == sorted(of_row(i)[0] for i in range(len(ROWS)))
    for place, query in enumerate(queries):
        _, pos, neg = next(of_row(i) for i in range(len(ROWS)) if of_row(i)[0] == query)
        own = dict(zip(passages[3 * place : 3 * place + 3], scores[3 * place : 3 * place + 3], strict=True))
        first, *others = own
        assert own[first] == pos[first] and others and all(own[text] == neg[text] for text in others)


# ------------------------------------------------------------------------------------------ tevatron


def test_tevatron_makes_our_rows(written):
    """Its preprocessor and its training set of version 0.1, the one that PyPI has."""
    need("tevatron")
    from tevatron.arguments import DataArguments
    from tevatron.data import TrainDataset
    from tevatron.datasets import HFTrainDataset

    folder = written("tevatron", "mined.jsonl").parent
    arguments = DataArguments(
        dataset_name=str(folder), train_n_passages=3, dataset_proc_num=1, negative_passage_no_shuffle=True
    )
    letters = Letters()
    data = HFTrainDataset(letters, arguments, cache_dir=str(folder / "cache")).process()
    state = types.SimpleNamespace(epoch=0.0)
    trainer = types.SimpleNamespace(state=state, args=types.SimpleNamespace(seed=0))
    examples = TrainDataset(arguments, data, letters, trainer)
    assert len(examples) == len(ROWS)
    for i in range(len(ROWS)):
        query, pos, neg = of_row(i)
        found, passages = examples[i]
        assert found == query and passages[0] in pos and set(passages[1:]) <= set(neg) and len(passages) == 3
        if len(neg) > 1:
            assert passages[1:] == list(neg)[:2]


# ------------------------------------------------------------------------------------------ Automodel


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    texts = [text for i in range(len(ROWS)) for text in (of_row(i)[0], *of_row(i)[1], *of_row(i)[2])]
    words = {word: place for place, word in enumerate(("<pad>", "<unk>", *dict.fromkeys(texts)))}
    whole = Tokenizer(models.WordLevel(words, unk_token="<unk>"))  # a text is one word
    return PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="<pad>", unk_token="<unk>")


def check_automodel(data: Any, use_dataset_instruction: bool) -> None:
    """Of its training set of 3 passages, by what its collator gives the model."""
    from nemo_automodel.components.datasets.llm.retrieval_collator import BiEncoderCollator

    tokenizer = word_tokenizer()
    batch = BiEncoderCollator(tokenizer, use_dataset_instruction=use_dataset_instruction)(
        [data[i] for i in range(len(data))]
    )
    queries, documents = (tokenizer.batch_decode(batch[f"{side}_input_ids"]) for side in "qd")
    assert len(queries) == len(ROWS) and len(documents) == 3 * len(ROWS)
    for i, found in enumerate(queries):
        query, pos, neg = of_row(i)
        others = list(neg)
        want = [next(iter(pos)), others[0], others[1 % len(others)]]
        assert (found, documents[3 * i : 3 * i + 3]) == (query, want)
    ids = batch["passage_doc_ids"].tolist()
    assert len(set(ids)) == len(set(documents)), "it masks documents of one id"


@pytest.mark.parametrize("use_dataset_instruction", [False, True])
def test_automodel_makes_our_rows(written, use_dataset_instruction):
    need("nemo_automodel")
    from nemo_automodel.components.datasets.llm.retrieval_dataset import RetrievalDatasetConfig

    how = {"n_passages": 3, "use_dataset_instruction": use_dataset_instruction}
    path = str(written("automodel", "mined.json"))
    check_automodel(RetrievalDatasetConfig(data_dir_list=path, **how).build(), use_dataset_instruction)


def test_automodel_reads_a_dataset_folder_as_a_subset_of_the_release(written, tmp_path, monkeypatch):
    """As hf://, with the hub's files here; instructions are the folder's."""
    need("nemo_automodel")
    import datasets
    from nemo_automodel.components.datasets.llm import retrieval_dataset as theirs

    rows = [{name: row[name] for name in ("query", "pos", "neg")} for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = str(tmp_path / "rows.jsonl")
    source = DatasetConfig(path=path, task="find", document_task=f"{DOCUMENT_PROMPT}{{text}}")
    folder = Path(write_datasets(DataConfig(datasets=[source]), tmp_path / "Set", print).datasets[0].path)

    def load(repo: str, name: str, split: str) -> Any:
        side = "corpus" if name == "Set_corpus" else "queries"
        return datasets.load_dataset("parquet", data_files=str(folder / f"{side}.parquet"), split=split)

    monkeypatch.setattr(theirs, "hf_hub_download", lambda repo_id, filename, repo_type: tmp_path / filename)
    monkeypatch.setattr(theirs, "load_dataset", load)
    data = theirs.RetrievalDatasetConfig(
        data_dir_list="hf://someone/release/Set", n_passages=3, use_dataset_instruction=True
    ).build()
    check_automodel(data, True)


# --------------------------------------------------------------------------------- sentence-transformers


@pytest.mark.parametrize("loss_name", ["MultipleNegativesRankingLoss", "MarginMSELoss"])
def test_two_steps_of_sentence_transformers_own_trainer(written, tmp_path, loss_name):
    """Texts alone, and their scores as margins."""
    need("accelerate")
    import torch
    from datasets import load_dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    path = written("sentence-transformers", "mined.parquet", num_negatives=2)
    data = load_dataset("parquet", data_files=str(path), split="train")
    wanted = [
        (*of_row(i), text) for i in range(len(ROWS)) if len(ROWS[i]["neg"]) > 1 for text in of_row(i)[1]
    ]
    assert len(data) == len(wanted) > 4
    for found, (query, pos, neg, text) in zip(data, wanted, strict=True):
        assert [found[name] for name in ("query", "positive", "negative_1", "negative_2")] == [
            query, text, *list(neg)[:2],
        ]  # fmt: skip
        assert found["scores"] == [pos[text], *list(neg.values())[:2]]
    torch.manual_seed(0)
    model = SentenceTransformer(
        modules=[StaticEmbedding(word_tokenizer().backend_tokenizer, embedding_dim=8)], device="cpu"
    )
    before = [weight.clone() for weight in model.parameters()]
    arguments = Arguments(
        output_dir=str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=4, learning_rate=0.1,
        report_to=[], save_strategy="no", logging_steps=1, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    loss = getattr(losses, loss_name)(model)
    if loss_name == "MarginMSELoss":  # its labels are the margins between the positive and each negative
        data = data.map(lambda row: {"scores": [row["scores"][0] - score for score in row["scores"][1:]]})
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss)
    trainer.train()
    values = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(values) == 2 and all(math.isfinite(value) and value > 0 for value in values)
    assert any(not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
