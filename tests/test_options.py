"""Options from the command line, YAML, dicts and constructors: one set of values, errors and texts."""

import contextlib
import copy
import dataclasses
import io
import json
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recipes import ROOT
from tiny import train_config

from nemo_embed_core import config as c
from nemo_embed_core.command_line import load_config
from nemo_embed_core.errors import UserError
from nemo_embed_core.options import Options, dump_yaml, to_dict

CLASSES = sorted((k for k in vars(c).values() if isinstance(k, type) and issubclass(k, Options)), key=str)
CLASSES.remove(Options)
NEEDED: dict[type, dict[str, Any]] = {
    c.TrainConfig: {"output_dir": "runs/x", "steps": 3},
    c.PrepareConfig: {"tokenizer": "folder"},
    c.MineConfig: {"model": "m", "data": "d", "output": "o"},
    c.EvaluateConfig: {},
    c.PlanConfig: {"train": "run.yaml"},
    c.ExperimentConfig: {"grid": "grid.yaml", "output": "o"},
    c.JudgeConfig: {"mined": "m", "output": "o", "labels": "l"},
    c.SynthesizeConfig: {"documents": "docs", "output": "o"},
    c.PipelineConfig: {"documents": "docs", "output": "o"},
    c.DatasetConfig: {"path": "p"},
    c.GeneratorConfig: {"name": "m"},
    c.MineDatasetConfig: {"path": "p"},
    c.EvalDatasetConfig: {"path": "p"},
}


def refusal(make: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as error:
        make()
    return str(error.value)


def leaves(values: dict[str, Any], prefix: str = "") -> set[str]:
    found = set()
    for key, value in values.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
    return found


# ------------------------------------------------------------------------------------------ values


def test_a_dict_gives_the_config_that_it_came_from_and_stays_as_it_was(tmp_path: Path) -> None:
    changes = {"optim": {"lr": 3e-4, "warmup_steps": 2}, "checkpoint": {"allow_changed": ["seed"]}}
    config = train_config(tmp_path, **changes)
    values = json.loads(json.dumps(to_dict(config)))
    before = copy.deepcopy(values)
    again = c.TrainConfig.from_dict(values)
    assert again == config and values == before
    assert isinstance(again.model.rope_scaling, c.RopeScaling)
    assert isinstance(again.data.datasets[0], c.DatasetConfig)
    scaling = config.model.rope_scaling
    mixed = c.TrainConfig.from_dict({**values, "data": config.data, "model": {"rope_scaling": scaling}})
    assert mixed.data == config.data and mixed.model == c.ModelConfig(rope_scaling=scaling)


@pytest.mark.parametrize("old, word", [(True, "full"), (False, "none")])
def test_activation_checkpointing_is_still_true_or_false(tmp_path: Path, old: bool, word: str) -> None:
    """As files of options and checkpoints from before `selective` say it."""
    text = str(old).lower()
    path = tmp_path / "old.yaml"
    path.write_text(f"output_dir: a\nsteps: 7\nactivation_checkpointing: {text}\n")
    argv = ["--output_dir=a", "--steps=7", "--activation_checkpointing", text]
    for config in (
        c.TrainConfig(output_dir="a", steps=7, activation_checkpointing=old),
        c.TrainConfig.from_yaml(path),
        load_config(c.TrainConfig, ["--config", str(path)]),
        load_config(c.TrainConfig, argv),
    ):
        assert config.activation_checkpointing == word
    dump_yaml(config, path)
    assert c.TrainConfig.from_yaml(path) == config


@pytest.mark.parametrize("cls", NEEDED, ids=lambda cls: cls.__name__)
def test_of_every_config_a_dict_with_the_needed_options_is_enough(cls: Any) -> None:
    assert cls.from_dict(NEEDED[cls]) == cls(**NEEDED[cls])
    for name in (name for name in NEEDED[cls] if cls not in (c.MineConfig, c.PrepareConfig, c.JudgeConfig)):
        less = {key: value for key, value in NEEDED[cls].items() if key != name}
        either = cls is c.TrainConfig and name == "steps"
        missing = "give steps or epochs: how long to train" if either else f"{name} is missing"
        said = refusal(lambda: cls.from_dict(less))  # noqa: B023
        assert said == missing or said.startswith(f"{missing}: ")  # and where another option would do


def test_options_beside_a_file_override_only_the_keys_that_they_have(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: a\nsteps: 7\noptim:\n  lr: 1e-3\n  beta2: 0.98\n")
    config = c.TrainConfig.from_yaml(path, output_dir="b", optim={"lr": 2e-3})
    assert (config.output_dir, config.steps, config.optim.lr, config.optim.beta2) == ("b", 7, 2e-3, 0.98)
    over = tmp_path / "over.yaml"
    over.write_text("optim: {lr: 3e-3}\ndata: {weights: {b: 3}}\n")
    path.write_text(path.read_text() + "data:\n  datasets: [{path: a}, {path: b}]\n  weights: {a: 2}\n")
    both = [f"--config={path}", f"--config={over}", "--output_dir=b"]
    config = c.TrainConfig.from_yaml(path, over, output_dir="b")
    assert config == load_config(c.TrainConfig, both)
    assert (config.optim.lr, config.optim.beta2, config.data.weights) == (3e-3, 0.98, {"b": 3}), (
        "a value whole"
    )
    assert [d.weight for d in config.data.datasets] == [1, 3]
    config = load_config(c.TrainConfig, [*both, "--data.weights.a=0.5"])
    assert [d.weight for d in config.data.datasets] == [0.5, 3]
    (tmp_path / "optim.yaml").write_text("lr: 5e-4\n")
    argv = ["--output_dir=b", "--steps=7", "--optim", str(tmp_path / "optim.yaml"), "--optim.beta2", "0.9"]
    optim = load_config(c.TrainConfig, argv).optim
    assert (optim.lr, optim.beta2) == (5e-4, 0.9)


@pytest.mark.parametrize("cls", [k for k in c.LAUNCHERS.values() if NEEDED[k]], ids=lambda cls: cls.__name__)
def test_a_command_without_arguments_says_what_is_missing(cls: Any) -> None:
    """The first that a newcomer types."""
    assert re.search(r"is missing|^give --", refusal(lambda: load_config(cls, [])))


def test_a_value_that_follows_from_others_is_no_default() -> None:
    sizes = {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    argv = ["--output_dir", "x", "--steps", "1", *(f"--model.{key}={value}" for key, value in sizes.items())]
    assert load_config(c.TrainConfig, argv).model.head_dim == 24
    assert c.TrainConfig.from_dict({**NEEDED[c.TrainConfig], "model": sizes}).model.head_dim == 24


def test_lists_are_words_on_the_command_line() -> None:
    argv = ["--model", "a", "b", "--sweep", "0.8", "0.9", "--data", "d", "--output", "o", "--exclude=[x]"]
    config = load_config(c.MineConfig, argv)
    assert (config.model, config.sweep, config.exclude) == (["a", "b"], [0.8, 0.9], ["x"])


# ------------------------------------------------------------------------------------------ errors

NAN = float("nan")
WRONG: list[tuple[dict[str, Any], list[str], str]] = [
    ({"optim": {"lrr": 1}}, ["--optim.lrr=1"], "optim.lrr is not an option; did you mean optim.lr?"),
    ({"optim": {"lr": "fast"}}, ["--optim.lr=fast"], "optim.lr=fast must be a finite number"),
    ({"optim": {"lr": NAN}}, ["--optim.lr=.nan"], "optim.lr=nan must be a finite number"),
    ({"optim": {"lr": -1}}, ["--optim.lr=-1"], "must be positive"),
    ({"steps": 1.5}, ["--steps=1.5"], "steps=1.5 must be an integer"),
    ({"steps": True}, ["--steps=true"], "must be an integer"),
    ({"loss": {"in_batch": "x"}}, ["--loss.in_batch=x"], "in_batch=x must be one of none, positives, all"),
    ({"data": {"datasets": [{"path": "x", "tsk": "y"}]}}, ['--data.datasets=[{"path": "x", "tsk": "y"}]'],
     "data.datasets.tsk is not an option; did you mean data.datasets.task?"),
    ({"data": {"datasets": [{"path": 3}]}}, ['--data.datasets=[{"path": 3}]'],
     "data.datasets.path=3 must be a string"),
    ({"data": {"datasets": [{"task": "y"}]}}, ['--data.datasets=[{"task": "y"}]'],
     "data.datasets.path is missing"),
    ({"data": {"datasets": {"path": "x"}}}, ['--data.datasets={"path": "x"}'],
     "must be a list (each a DatasetConfig)"),
    ({"data": {"weights": {"a": "x"}}}, ["--data.weights={a: x}"],
     "must be a mapping (to each name a finite number)"),
    ({"data": {"datasets": [{"path": "d/a.jsonl"}], "weights": {"b": 2}}},
     ["--data.datasets=[{path: d/a.jsonl}]", "--data.weights.b=2"],
     "data.weights has b, which no dataset is called; there are: a"),
    ({"model": {"rope_scaling": {"factr": 2}}}, ['--model.rope_scaling={"factr": 2}'],
     "model.rope_scaling.factr is not an option; did you mean model.rope_scaling.factor?"),
    ({"model": {"rope_scaling": {"factor": "x"}}}, ['--model.rope_scaling={"factor": "x"}'],
     "rope_scaling.factor=x must be a "),
]  # fmt: skip


@pytest.mark.parametrize("values, argv, text", WRONG, ids=[" ".join(argv) for _, argv, _ in WRONG])
def test_a_wrong_value_is_refused_alike_from_dict_yaml_and_command_line(
    tmp_path: Path, values: dict[str, Any], argv: list[str], text: str
) -> None:
    needed = NEEDED[c.TrainConfig]
    path = tmp_path / "x.yaml"
    path.write_text(json.dumps({**needed, **values}).replace("NaN", ".nan"))
    messages = [
        refusal(lambda: c.TrainConfig.from_dict({**needed, **values})),
        refusal(lambda: load_config(c.TrainConfig, [*(f"--{k}={v}" for k, v in needed.items()), *argv])),
        refusal(lambda: load_config(c.TrainConfig, ["--config", str(path)])),
        refusal(lambda: c.TrainConfig.from_yaml(path)).removeprefix(f"{path}: "),
    ]
    for message in messages:
        assert text in message.replace("'", "").replace("[0]", ""), messages
        assert "\n" not in message and len(message) < 200


@pytest.mark.parametrize(
    "option", ["optim.lr.x", "steps.7", "checkpoint.allow_changed.seed", "model.rope_scaling.factor.y"]
)
def test_an_option_below_an_option_is_named_as_it_was_given(option: str) -> None:
    argv = [f"--{key}={value}" for key, value in NEEDED[c.TrainConfig].items()]
    message = refusal(lambda: load_config(c.TrainConfig, [*argv, f"--{option}=3"]))
    assert message == f"{option} is not an option; did you mean {option.rpartition('.')[0]}?"


PLANTED = "planted.Class"


@pytest.mark.parametrize("name", ["optim", "data.datasets", "model.rope_scaling"])
@pytest.mark.parametrize("value", [PLANTED, [PLANTED], {"class_path": PLANTED}], ids=str)
def test_no_value_makes_us_import_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    """The parser knows values that name a class, and would import it to see whether it fits."""
    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\nclass Class: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    section, _, key = name.partition(".")
    values = {**NEEDED[c.TrainConfig], section: {key: value} if key else value}
    (tmp_path / "x.yaml").write_text(json.dumps(values))
    argv = [f"--{k}={v}" for k, v in NEEDED[c.TrainConfig].items()]
    for make in (
        lambda: c.TrainConfig.from_dict(values),
        lambda: load_config(c.TrainConfig, ["--config", str(tmp_path / "x.yaml")]),
        lambda: load_config(
            c.TrainConfig, [*argv, f"--{name}", value if isinstance(value, str) else json.dumps(value)]
        ),
    ):
        assert refusal(make).startswith((name, "class_path=planted.Class"))
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("value", [3, None, [], {3: 4}], ids=str)
def test_a_sub_config_that_is_no_mapping_is_refused(value: Any) -> None:
    for values in ({**NEEDED[c.TrainConfig], "optim": value}, value):
        text = refusal(lambda v=values: c.TrainConfig.from_dict(v))
        assert re.match(r"(optim|TrainConfig)=.* must be a mapping|(optim\.)?3 is not an option", text), text


def test_wrong_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    argv = [f"--{key}={value}" for key, value in NEEDED[c.TrainConfig].items()]
    for text, message in (
        ("lr: 1\nlr: 2\n", f"{path}:2: key 'lr' stands here and on line 1"),
        ("- lr\n", f"{path} holds no mapping of options"),
        ("# nothing\n", f"{path} holds no mapping of options"),
        ("lr: [1\n", f"{path} is not valid YAML"),
    ):
        path.write_text(text)
        for option in ("--optim", "--config"):
            for given in ([option, str(path)], [f"{option}={path}"]):
                said = refusal(lambda g=given: load_config(c.TrainConfig, [*argv, *g]))
                assert said.startswith(message)
        assert refusal(lambda: c.OptimConfig.from_yaml(path)).startswith(message)
    path.write_bytes(b"lr: \xff")
    assert refusal(lambda: c.OptimConfig.from_yaml(path)).startswith(f"{path} cannot be read")
    assert str(tmp_path / "no") in refusal(lambda: c.OptimConfig.from_yaml(tmp_path / "no"))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_constructor_keeps_no_value_of_another_type(cls: Any) -> None:
    good = cls(**NEEDED.get(cls, {}))
    for field in dataclasses.fields(cls):
        wrong: list[Any] = [object(), [object()], {"path": "x"}, [{"path": "x"}], float("inf")]
        kind = typing.get_type_hints(cls)[field.name]
        wrong = [value for value in wrong if kind != dict[str, str] or value != {"path": "x"}]
        wrong += [] if bool in (kind, *typing.get_args(kind)) else [True]
        wrong += [] if str in (kind, *typing.get_args(kind)) else ["1"]
        for value in wrong:
            text = refusal(lambda v=value, f=field: dataclasses.replace(good, **{f.name: v}))
            assert re.search(rf"(^|\.){field.name}=.* must be ", text), text


def test_a_dict_in_a_constructor_is_told_the_way() -> None:
    wrong: Any = {"datasets": []}
    text = refusal(lambda: c.TrainConfig(output_dir="x", steps=1, data=wrong))
    assert text == "data={'datasets': []} must be a DataConfig; from_dict takes a dict in its place"


# ------------------------------------------------------------------------------------------ texts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbers(Options):
    """A list of numbers, as a loss may have one of dimensions."""

    dims: list[int] = dataclasses.field(default_factory=list)
    """Dimensions."""


def test_a_list_of_numbers_is_given_like_one_of_names() -> None:
    assert load_config(Numbers, ["--dims", "16", "32"]) == Numbers(dims=[16, 32])


def help_of(cls: type[Options], argument: str = "--help") -> dict[str, str]:
    """{option: text} as printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as end:
        load_config(cls, [argument])
    assert end.value.code == 0
    entries = re.split(r"^  --", printed.getvalue(), flags=re.M)[1:]
    return {re.split(r"[\s,]", entry)[0]: " ".join(entry.split("\n\n")[0].split()) for entry in entries}


@pytest.mark.parametrize("cls", c.LAUNCHERS.values(), ids=c.LAUNCHERS)
def test_help_has_a_text_for_every_option(cls: Any) -> None:
    texts = help_of(cls)
    unexpanded = cls(**NEEDED[cls])
    assert leaves(to_dict(unexpanded)) <= set(texts)
    for name in leaves(to_dict(unexpanded)):
        assert re.search(r"[a-z]{3}.*[.;] \((required, )?type: ", texts[name]), f"--{name}: {texts[name]}"
    for name in [name for name in texts if name.endswith(".help")]:
        for key, text in help_of(cls, f"--{name}").items():
            assert re.search(r"[a-z]{3}.*[.;] \((required, )?type: ", text), f"{key}: {text}"


def test_the_page_of_options_has_them_all_and_no_empty_cell() -> None:
    page = (ROOT / "docs/options.md").read_text(encoding="utf-8")
    for name, cls in c.LAUNCHERS.items():
        section = page.split(f"## launch/{name}.py")[1].split("\n## ")[0]
        listed = set(re.findall(r"^\| `([\w.\[\]]+)` \|", section, re.M))
        assert leaves(to_dict(cls(**NEEDED[cls]))) <= listed, name
    rows = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) > 130 and all(len(row) == 4 and all(cell.strip() for cell in row) for row in rows)
