"""A push is one commit of what was proven, or an error that says what to change; the token is nowhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from toy_hub import TOKEN, ToyHub, toy_hub

from nemo_embed_core.errors import UserError
from nemo_embed_core.export import front_matter, hub
from nemo_embed_core.export.formats import PLACE
from nemo_embed_core.export.hub import Push
from nemo_embed_core.merge import merge, publish

CARD = f"---\nlicense: mit\ntags:\n- x\n---\n# toy\n\nvllm serve {PLACE}\n"
PUSH = Push("me/toy")


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[ToyHub]:
    with toy_hub(monkeypatch) as found:
        yield found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {"README.md": CARD, "config.json": "{}", "1_Pooling/config.json": '{"a": 1}', "empty.txt": ""}
    files |= {"model.safetensors": "weights" * 99, "onnx/model.onnx": "graph" * 99}
    for name, text in files.items():
        (tmp_path / "toy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "toy" / name).write_text(text)
    return tmp_path / "toy"


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in hub.files_of(folder).items()}


# ------------------------------------------------------------------------------------------ before anything


@pytest.mark.parametrize(
    "repo",
    [
        "toy",
        "me/you/toy",
        "me/a--b",
        "me/a..b",
        "me/toy.git",
        "-me/toy",
        "me/toy-",
        "me/" + "a" * 96,
        "me/tö",
    ],
)
def test_a_malformed_name_is_said_before_anything_is_asked(repo: str) -> None:
    with pytest.raises(UserError, match="a name on the hub is USER/NAME"):
        Push.of(repo)


def test_options_of_a_push_need_its_name() -> None:
    assert Push.of(None) is None
    assert Push.of("me-2/Toy_1.b", True, True, ["r"]) == Push("me-2/Toy_1.b", True, True, ("r",))
    for options in ((True, False, ()), (False, True, ()), (False, False, ["r.json"])):
        with pytest.raises(UserError, match="go with --push-to-hub"):
            Push.of(None, *options)


def test_hidden_files_and_links_are_not_published(folder: Path) -> None:
    assert list(hub.files_of(folder)) == sorted(bytes_of(folder)) and len(bytes_of(folder)) == 6
    (folder / "link").symlink_to("config.json")
    with pytest.raises(UserError, match="link is a link, which no export has"):
        hub.files_of(folder)
    (folder / "link").unlink()
    (folder / "onnx" / ".env").write_text("SECRET=1")
    with pytest.raises(UserError, match=r"\.env is hidden"):
        hub.files_of(folder)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("offline", "unset HF_HUB_OFFLINE"),
        ("no token", "run `hf auth login`, or set HF_TOKEN"),
        ("other token", "does not know the token"),
        ("read only", "may not write there: take one with write access to me"),
        ("public", "me/toy is public, which a push does not change"),
        ("down", "the login: .*Connect"),
    ],
)
def test_who_may_not_push_is_told_why(
    fault: str, message: str, folder: Path, there: ToyHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    if fault == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if fault == "no token":
        monkeypatch.setenv("HF_TOKEN", "")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "none"))
    if fault == "other token":
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    if fault == "down":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    if fault == "public":
        there.add("me/toy")
    there.write = fault != "read only"
    if fault != "read only":
        with pytest.raises(UserError, match=message) as error:
            hub.check_login(Push("me/toy", private=True))
        assert "hf_" not in str(error.value)
    with pytest.raises(UserError, match=message):
        hub.upload(Push("me/toy", private=True), bytes_of(folder))
    assert there.repos.get("me/toy", {"files": {}})["files"] == {}


# ------------------------------------------------------------------------------------------ sent


def test_all_of_it_is_there_in_one_commit_and_a_second_push_sends_nothing(
    folder: Path, there: ToyHub
) -> None:
    files: dict[str, Any] = {**hub.files_of(folder), "config.json": b'{"made": "here"}'}
    commit = hub.upload(Push("me/toy", private=True), files)
    repo = there.repos["me/toy"]
    assert repo["private"] and repo["commits"] == ["0" * 40, commit]
    assert repo["files"] == {**bytes_of(folder), "config.json": b'{"made": "here"}', ".gitattributes": b"*"}
    there.requests.clear()
    assert hub.upload(Push("me/toy"), files) == commit and repo["commits"][-1] == commit
    assert not [request for request in there.requests if "/put/" in request or "/commit/" in request]
    changed = {**files, "config.json": b"{}"}
    assert hub.upload(PUSH, changed) != commit and repo["files"]["config.json"] == b"{}"


def test_a_repository_with_other_files_is_left_alone(folder: Path, there: ToyHub) -> None:
    there.add("me/toy", **{"README.md": b"theirs", "old-shard.safetensors": b"x", ".gitattributes": b"*"})
    before = dict(there.repos["me/toy"]["files"])
    with pytest.raises(UserError, match=r"stay beside it: old-shard\.safetensors; delete them there"):
        hub.upload(PUSH, bytes_of(folder))
    assert there.repos["me/toy"]["files"] == before


def test_what_the_hub_keeps_wrongly_is_noticed(folder: Path, there: ToyHub) -> None:
    for damaged in ("model.safetensors", "config.json"):
        there.damages = damaged
        with pytest.raises(UserError, match=f"its {damaged} is not ours"):
            hub.upload(Push(f"me/{damaged}"), bytes_of(folder))


def test_whoever_changed_it_meanwhile_is_not_overwritten(
    folder: Path, there: ToyHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.upload(PUSH, bytes_of(folder))
    real = hub._existing

    def then_changed(push: Push) -> Any:
        info = real(push)
        there.repos["me/toy"]["commits"].append("f" * 40)
        return info

    monkeypatch.setattr(hub, "_existing", then_changed)
    with pytest.raises(UserError, match=r"sending the files: .*412"):
        hub.upload(PUSH, {**bytes_of(folder), "config.json": b"other"})


# ------------------------------------------------------------------------------------------ published


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What mteb is told is made elsewhere: tests/evaluation."""
    asked: list[Any] = []
    monkeypatch.setattr(
        publish.model_meta, "model_meta", lambda *arguments: asked.append(arguments) or b"{meta}"
    )
    return asked


def test_a_failure_half_way_shows_nothing_and_says_what_to_run_again(
    folder: Path, there: ToyHub, meta: list[Any], capsys: pytest.CaptureFixture
) -> None:
    there.fails = {"/commit/main": 400}
    said: list[str] = []
    with pytest.raises(UserError) as error:
        publish.publish(folder, Push("me/toy", private=True), said.append)
    again = f"Run again: launch/merge.py --check {folder} --push-to-hub me/toy --private"
    assert str(error.value).endswith(again) and "whole and proven" in str(error.value)
    assert f"***, {there.url}" in str(error.value)  # what the hub answered, for once with secrets
    assert list(there.repos["me/toy"]["files"]) == [".gitattributes"] and len(there.objects) == 2
    there.fails = {"PUT": 500}  # which would fail, if what lies there were sent again
    publish.publish(folder, Push("me/toy", private=True), said.append)
    captured = capsys.readouterr()
    everything = "\n".join([*said, str(error.value), captured.out, captured.err])
    assert TOKEN not in everything and "secret" not in everything
    assert said[-1].startswith(f"pushed {folder} to me/toy (7 files, ")


def test_the_hub_gets_the_card_under_its_name_and_the_folder_stays(
    folder: Path, there: ToyHub, meta: list[Any]
) -> None:
    before = bytes_of(folder)
    publish.publish(folder, PUSH, lambda line: None)
    files = there.repos["me/toy"]["files"]
    assert files["README.md"].decode().endswith("# toy\n\nvllm serve me/toy\n")
    assert files["model_meta.json"] == b"{meta}" and bytes_of(folder) == before
    assert meta[0][:2] == (folder, "me/toy") and meta[0][2]["license"] == "mit"


def test_a_dry_run_asks_nobody_and_shows_files_and_card(
    folder: Path, there: ToyHub, meta: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    said: list[str] = []
    assert publish.publish(folder, Push("me/toy", dry_run=True), said.append) == ""
    assert there.requests == []
    text = "\n".join(said)
    assert "  model.safetensors: 693 bytes\n" in text and "  model_meta.json: 6 bytes\n" in text
    assert "| license: mit" in text and "| vllm serve me/toy" in text
    assert "names no language, no base_model;" in text and "no license" not in text
    assert "dry run: nothing was sent; me/toy would have 7 files" in said[-1]


@pytest.mark.parametrize("proof", ["fails", "holds"])
@pytest.mark.parametrize("verb", ["check", "merge"])
def test_what_was_proven_is_pushed_and_what_was_not_is_not(
    verb: str, proof: str, there: ToyHub, meta: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from tiny import write_hf

    strict, source = [], write_hf(tmp_path / "source", torch.float32)

    def verified(path: Path, *_: Any, ours: bool, **__: Any) -> Any:
        strict.append(ours)
        if proof == "fails":
            raise UserError("runs with a causal mask")
        return {"transformers": "5", "sentence_transformers": "6"}

    monkeypatch.setattr(merge, "verify_folder", verified)
    run: Any = {
        "check": lambda: merge.check(source, push=PUSH, say=lambda line: None),
        "merge": lambda: merge.merge(source, tmp_path / "out", push=PUSH, say=lambda line: None),
    }[verb]
    (source / "README.md").write_text(CARD)
    if proof == "fails":
        with pytest.raises(UserError, match="causal mask"):
            run()
        assert there.requests == ["GET /api/whoami-v2", "GET /api/models/me/toy"] and not meta
    else:
        run()
        pushed = set(there.repos["me/toy"]["files"]) - {".gitattributes", "model_meta.json"}
        assert pushed == set(hub.files_of(source if verb == "check" else tmp_path / "out"))
    assert strict == [True]


def test_a_pushed_folder_is_asked_of_all_who_read_a_file_of_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path, name: str, embed: Any) -> Any:
        raise UserError(f"{name} gives other vectors")

    versions = {"transformers": "5", "sentence_transformers": "6"}
    monkeypatch.setattr(merge, "verify_folder", lambda *_, **__: versions)
    monkeypatch.setattr(merge.serving, "ask", fails)
    with pytest.raises(UserError, match="onnxruntime gives other vectors"):
        merge.check(folder, push=Push("me/toy", dry_run=True), say=lambda line: None)


@pytest.mark.parametrize("verb", ["check", "merge"])
def test_without_mteb_nothing_is_proven_first(
    verb: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = publish.find_spec
    monkeypatch.setattr(publish, "find_spec", lambda name: None if name == "mteb" else find(name))
    monkeypatch.setattr(merge, "verify_folder", lambda *_, **__: pytest.fail("an hour of work"))
    push = Push("me/toy", dry_run=True)
    with pytest.raises(UserError, match=r"--push-to-hub needs mteb: pip install 'nemo_embed_core\[eval\]'"):
        if verb == "check":
            merge.check(folder, push=push)
        else:
            merge.merge(folder, folder.parent / "out", push=push)


def test_adapters_which_are_not_proven_are_not_pushed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="format=peft is not proven"):
        merge.merge("runs/x", tmp_path / "out", format="peft", push=PUSH)


# ------------------------------------------------------------------------------------------ the card's head


def test_scores_stand_at_the_head_and_what_a_publisher_wrote_stays() -> None:
    from huggingface_hub import EvalResult

    row = {"task_type": "text-retrieval", "dataset_type": "mteb/scifact", "dataset_name": "SciFact (default)"}
    result = EvalResult(**row, metric_type="ndcg_at_10", metric_value=0.25, dataset_split="test")
    text, fields = front_matter.published(CARD, "me/toy", [result], Path("README.md"))
    head = yaml.safe_load(text.split("---\n")[1])
    assert head == fields and head["license"] == "mit" and head["tags"] == ["x", "mteb"]
    (index,) = head["model-index"]
    assert index["name"] == "me/toy" and index["results"][0]["metrics"] == [
        {"type": "ndcg_at_10", "value": 0.25}
    ]
    again, _ = front_matter.published(text, "me/toy", [result], Path("README.md"))
    assert again == text
    assert front_matter.missing(fields) == ["language", "base_model"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# toy\n", "no fields between two lines of ---"),
        ("---\na: [\n---\n", "are no YAML"),
        ("---\n- a\n---\n", "are a list"),
    ],
)
def test_a_card_without_a_head_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"README.md.* {message}"):
        front_matter.read(text, Path("README.md"))
