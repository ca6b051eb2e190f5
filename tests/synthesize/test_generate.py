"""Against an endpoint on this machine that misbehaves (benchmarks/synthesis_server.py): every fault, kills, a
budget, keys."""

import fcntl
import itertools
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.synthesis_server import IN_THE_ANSWER, ON_THE_WAY, Server
from nemo_embed_core.config import DatasetConfig, SynthesizeConfig
from nemo_embed_core.data.dataset import read_metadata
from nemo_embed_core.data.readers import read_rows
from nemo_embed_core.errors import UserError, user_errors
from nemo_embed_core.files.durable import sha256_folder
from nemo_embed_core.synthesize import assemble, journal
from nemo_embed_core.synthesize.client import Endpoint
from nemo_embed_core.synthesize.generate import generate

pytest.importorskip("openai", reason="the extra [synthesize] (openai) is not installed")
pytest.importorskip("datasketch", reason="the extra [synthesize] (datasketch) is not installed")

GUIDE = "# Machines\n\n" + "\n\n".join(
    f"## Hall {i}\n\nThe machine of hall {i} was built by people of the valley, who moved it in winter {i}."
    for i in range(12)
)


def config(server: Server, folder: Path, **generating: Any) -> SynthesizeConfig:
    (folder / "in").mkdir(exist_ok=True)
    (folder / "in/guide.md").write_text(GUIDE)
    model, licences = generating.pop("model", {}), generating.pop("licences", {})
    models = [
        {
            "name": name,
            "base_url": server.url,
            "max_in_flight": 4,
            "licence": licences.get(name, f"licence of {name}"),
        }
        | {"input_price": 1.0, "output_price": 2.0}
        | model
        for name in generating.pop("names", ("large", "small"))
    ]
    options = {"languages": ["English", "German"], "requests": 60, "timeout_s": 60.0, "backoff_s": 0.0}
    options |= {"max_output_tokens": 900, "models": models, "tasks": {"question": 1.0, "topic": 1.0}}
    return SynthesizeConfig.from_dict(
        {
            "output": str(folder / "out"),
            "documents": str(folder / "in"),
            "licence": "CC0-1.0",
            "self_pairs": {"held_out": 0.0},
            "generate": options | generating,
        }
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def verdicts(folder: Path) -> dict[str, str]:
    """By the digest of the request, in the order of the plan."""
    return {line["digest"]: line["verdict"] for line in lines(folder / "out/datasets/verdicts.jsonl")}


def silent(_: str) -> None:
    pass


def test_every_fault_is_met_and_every_planted_row_is_left_out_for_its_reason(tmp_path: Path) -> None:
    with Server(
        dict.fromkeys([*ON_THE_WAY, *IN_THE_ANSWER], 0.045) | {"timeout": 0.01, "duplicate": 0.15}
    ) as server:
        options = config(
            server,
            tmp_path,
            requests=150,
            timeout_s=1.5,
            tasks={"question": 2.0, "document-question": 1.0, "similarity": 1.0},
        )
        counts = generate(options, silent)
        found = verdicts(tmp_path)
        assert len(found) == 150
        # Twice only where this machine was too busy to hear the answer in time.
        events: dict[str, set[str]] = {"refused": set(), "lost": set(), "sent": set(), "reply": set()}
        for line in lines(tmp_path / "out/journal.jsonl"):
            if "no connection" not in line.get("why", ""):  # a busy machine
                events[line["event"]].add(line["digest"])
        lost = events["lost"]
        assert {server.planted[digest] for digest in events["refused"]} == {"429", "429 without Retry-After"}
        assert {server.planted[digest] for digest in lost} >= {"timeout", "500", "cut", "half JSON"}
        assert all(count == 1 or digest in lost for digest, count in server.paid.items())
        planted: dict[str, Counter[str]] = {}
        for digest, verdict in found.items():
            planted.setdefault(server.planted[digest], Counter())[verdict] += 1
        assert set(planted) == {"", *ON_THE_WAY, *IN_THE_ANSWER}  # each was met
        for fault in ("", *ON_THE_WAY):
            assert set(planted[fault]) <= {"accepted", "duplicate"}, fault
        for fault, wanted in IN_THE_ANSWER.items():
            assert fault == "duplicate" or set(planted[fault]) == {wanted}, (fault, planted[fault])
        # Of a row and its copies one stays, whichever the plan has first.
        copies = sum(counts["duplicate"] for counts in planted.values())
        assert copies == planted["duplicate"].total() > 0
        rows = {
            name: list(
                read_rows(
                    DatasetConfig(
                        path=str(tmp_path / "out/datasets" / name),
                        min_grade=0 if name == "similarity" else None,
                    )
                )
            )
            for name in counts
        }
        assert (
            sum(map(len, rows.values()))
            == Counter(found.values())["accepted"]
            == sum(c["queries"] for c in counts.values())
        )
        assert all(row.neg and row.pos[0] != row.neg[0] for row in rows["question"])
        assert {row.pos[0].split("\n")[0] for row in rows["document-question"]} <= {
            f"Machines: Hall {i}" for i in range(12)
        }
        about = read_metadata(tmp_path / "out/datasets/document-question")
        assert about.licence == "licence of large, licence of small, CC0-1.0"
        assert sum(about.generator["models"].values()) == counts["document-question"]["queries"]
        assert (
            about.query_instruction == "Instruct: Given a question, retrieve documents that answer it\nQuery:"
        )
        similar = read_metadata(tmp_path / "out/datasets/similarity")
        assert similar.query_instruction == similar.passage_instruction and similar.task_type == "STS"
        # Given again it asks nobody, and writes the same bytes.
        asked, before = server.asked.total(), sha256_folder(tmp_path / "out")
        generate(options, silent)
        assert server.asked.total() == asked and sha256_folder(tmp_path / "out") == before


def killed(run: Callable[[], object], failpoint: str) -> None:
    """In a fork of its own, which dies of SIGKILL at the failpoint."""
    pid = os.fork()
    if not pid:
        os.environ["NEMO_EMBED_FAIL"] = failpoint
        try:
            run()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def answered(folder: Path) -> set[str]:
    """Digests of the replies in its journal."""
    return {line["digest"] for line in lines(folder / "out/journal.jsonl") if line["event"] == "reply"}


@pytest.mark.parametrize("remembers", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_again_and_again_no_pair_is_lost_or_paid_twice(tmp_path: Path, remembers: bool) -> None:
    faults = dict.fromkeys([*ON_THE_WAY[1:], *IN_THE_ANSWER], 0.03)
    del faults["duplicate"]  # which of them is the copy depends on who comes first
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    with Server(faults) as server:
        generate(config(server, tmp_path / "whole"), silent)
    with Server(faults, remembers=remembers) as server:
        options = config(server, tmp_path / "killed")
        have: set[str] = set()
        for share, event in ((0.1, "sent"), (0.3, "reply"), (0.5, "sent"), (0.3, "reply")):
            left = [digest for digest in verdicts(tmp_path / "whole") if digest not in have]
            killed(lambda: generate(options, silent), f"journal.{event}@{left[int(share * len(left))]}")
            assert have < answered(tmp_path / "killed")
            have, paid, asked = answered(tmp_path / "killed"), dict(server.paid), dict(server.asked)
        generate(options, silent)
        assert {d: n for d, n in server.paid.items() if d in have} == {
            d: n for d, n in paid.items() if d in have
        }
        assert all(server.asked[digest] == asked[digest] for digest in have)
        assert len(server.paid) == 60
        # Only what was in flight at a kill, at most 8 requests, can have been answered unknown to us.
        twice = sum(count - 1 for count in server.paid.values())
        assert twice == 0 if remembers else twice <= 4 * 8
        # What was sent and has no outcome stays at its worst, of each kill.
        unknown: dict[str, list[float]] = {}
        spent = 0.0
        for line in lines(tmp_path / "killed/out/journal.jsonl"):
            if line["event"] == "sent":
                unknown.setdefault(line["digest"], []).append(line["worst"])
            else:
                worst = unknown[line["digest"]].pop()
                spent += {"reply": line.get("cost"), "lost": worst, "refused": 0.0}[line["event"]]
        report = json.loads((tmp_path / "killed/out/datasets/report.json").read_text())
        assert report["spent"] == pytest.approx(spent + sum(map(sum, unknown.values())), rel=1e-9)
        assert sum(map(len, unknown.values())) >= 4
    assert sha256_folder(tmp_path / "killed/out/datasets/question") == sha256_folder(
        tmp_path / "whole/out/datasets/question"
    )
    assert verdicts(tmp_path / "killed") == verdicts(tmp_path / "whole")


def test_a_budget_ends_it_before_it_is_exceeded_and_a_higher_one_goes_on(tmp_path: Path) -> None:
    with Server({"429": 0.1, "half JSON": 0.1}, delay_s=0.01) as server:
        asked = 0
        for budget in (0.012, 0.03):
            said: list[str] = []
            generate(config(server, tmp_path, budget=budget), said.append)
            events = lines(tmp_path / "out/journal.jsonl")
            real = sum(event.get("cost", 0.0) for event in events)
            worst = max(event.get("worst", 0.0) for event in events)
            lost = sum(event["event"] == "lost" for event in events) * worst
            # Not one more request would have fitted.
            assert real <= budget and real + lost > budget - 2 * worst
            assert any(f"the budget of {budget:g} is used up" in line for line in said)
            assert asked < server.asked.total() < 60
            asked = server.asked.total()
        report = json.loads((tmp_path / "out/datasets/report.json").read_text())
        assert report["spent"] <= 0.03 and report["requests"]["not asked"] > 0
        generate(config(server, tmp_path), silent)
        assert len(server.paid) == 60 and set(server.paid.values()) == {1}


def test_no_more_are_in_flight_than_each_generator_may_have(tmp_path: Path) -> None:
    with Server(delay_s=0.02) as server:
        generate(config(server, tmp_path, model={"max_in_flight": 3}), silent)
        assert 3 < server.most_in_flight <= 6
    with Server({"429": 1.0}) as server:
        generate(config(server, tmp_path, model={"max_in_flight": 1}, names=("one",), requests=5), silent)
        assert server.most_in_flight == 1 and set(server.asked.values()) == {2}


def test_an_error_waits_for_what_is_in_flight_and_paid(tmp_path: Path) -> None:
    with Server(delay_s=0.3) as server:
        with pytest.raises(UserError, match=r"absent: 404 of .*there is no such model"):
            generate(config(server, tmp_path, names=("large", "absent")), silent)
        have = answered(tmp_path)
        assert 0 < len(have) <= 4 and have == set(server.paid)


def at_the_third_request(act: Callable[[], object]) -> Callable[[str, object], None]:
    """In place of the journal's failpoint."""
    sent = itertools.count(1)

    def failpoint(name: str, at: object) -> None:
        if name == "journal.sent" and next(sent) == 3:
            act()

    return failpoint


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_waits_for_what_is_in_flight_and_a_second_one_gives_it_up(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
) -> None:
    before = signal.getsignal(number)
    with Server(delay_s=0.2) as server:
        act = at_the_third_request(lambda: os.kill(os.getpid(), number))
        monkeypatch.setattr(journal, "failpoint", act)
        with pytest.raises(SystemExit) as end, user_errors():
            generate(config(server, tmp_path))
        have = answered(tmp_path)
        assert end.value.code == code and 3 <= len(have) <= 8 and have == set(server.paid)
        said = capsys.readouterr()
        assert f"waiting at most 60 s for {len(have)} that are" in said.out
        assert f"error: stopped by {number.name}: " in said.err and f"has {len(have)} replies" in said.err
        assert signal.getsignal(number) is before
        server.delay_s, start = 5.0, time.monotonic()
        act = at_the_third_request(lambda: [os.kill(os.getpid(), number) for _ in range(2)])
        monkeypatch.setattr(journal, "failpoint", act)
        with pytest.raises(SystemExit) as end, user_errors():
            generate(config(server, tmp_path))
        assert end.value.code == code and time.monotonic() - start < 4.0 and answered(tmp_path) == have
        events = lines(tmp_path / "out/journal.jsonl")
        given_up = events[2 * len(have) :]  # after each one's event "sent" and its reply
        assert 3 <= len(given_up) <= 8
        spent = sum(line.get("cost", 0.0) for line in events) + sum(line["worst"] for line in given_up)
        assert f"has {len(have)} replies, {spent:.4f} spent at most" in capsys.readouterr().err
        server.delay_s = 0.0
        monkeypatch.setattr(journal, "failpoint", lambda *_: None)
        generate(config(server, tmp_path), silent)
        assert have < answered(tmp_path) and all(server.paid[digest] == 1 for digest in have)


@pytest.mark.parametrize("where", ["the library", "the disk"])
def test_any_error_waits_for_what_is_in_flight_and_paid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError("as never before")

    if where == "the disk":
        monkeypatch.setattr(journal, "failpoint", at_the_third_request(fail))
    else:
        complete, calls = Endpoint.complete, itertools.count(1)
        monkeypatch.setattr(
            Endpoint, "complete", lambda *args: fail() if next(calls) == 3 else complete(*args)
        )
    with Server(delay_s=0.2) as server:
        with pytest.raises(OSError, match="as never before"):
            generate(config(server, tmp_path), silent)
        assert 2 <= len(answered(tmp_path)) <= 7 and answered(tmp_path) == set(server.paid)
    lost = [line["why"] for line in lines(tmp_path / "out/journal.jsonl") if line["event"] == "lost"]
    assert lost == (["OSError: as never before"] if where == "the library" else [])


def test_another_document_asks_for_its_own_share_alone_and_mixes_no_answers(tmp_path: Path) -> None:
    asked = {"tasks": {"document-question": 1.0}, "licences": {"small": ""}}
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    with Server() as server:
        generate(config(server, tmp_path / "one", **asked), silent)
        before = set(server.paid)
        (tmp_path / "one/in/a.md").write_text(GUIDE.replace("machine", "engine").partition("## Hall 4")[0])
        options = config(server, tmp_path / "one", **asked)
        os.rename(tmp_path / "one/in/guide.md", tmp_path / "one/in/z.md")
        generate(options, silent)
        assert 3 < len(server.paid.keys() - before) < 30 and set(server.paid.values()) == {1}
        assert len(verdicts(tmp_path / "one").keys() & before) > 30
    with Server() as server:  # the same answers to the same requests, of a journal that was never another's
        options = config(server, tmp_path / "other", **asked)
        for name in ("a.md", "z.md"):
            (tmp_path / "other/in" / name).write_bytes((tmp_path / "one/in" / name).read_bytes())
        (tmp_path / "other/in/guide.md").unlink()
        generate(options, silent)
    whole = tmp_path / "one/out/datasets/document-question", tmp_path / "other/out/datasets/document-question"
    assert sha256_folder(whole[0]) == sha256_folder(whole[1])
    assert read_metadata(whole[0]).licence == "licence of large, unknown (small), CC0-1.0"


def test_datasets_of_an_earlier_call_stay_until_the_new_ones_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Server() as server:
        generate(config(server, tmp_path, requests=9, licences={"large": "", "small": ""}), silent)
        before = sha256_folder(tmp_path / "out/datasets")
        assert read_metadata(next((tmp_path / "out/datasets").glob("*/"))).licence in ("", "CC0-1.0")
        with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
            patched.setattr(assemble, "write_bytes", lambda *_: 1 / 0)
            generate(config(server, tmp_path, requests=20), silent)
        assert sha256_folder(tmp_path / "out/datasets") == before
        generate(config(server, tmp_path, requests=20), silent)
        assert len(verdicts(tmp_path)) == 20
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["datasets", "journal.jsonl", "lock"]


@pytest.mark.parametrize(
    "absent, says",
    [({"judge": {"name": "nowhere"}}, "nowhere is no model folder"), ({"embedder": "nowhere"}, "nowhere")],
)
def test_a_model_that_is_not_there_is_met_before_anything_is_asked(
    tmp_path: Path, absent: dict[str, Any], says: str
) -> None:
    with Server() as server, pytest.raises(UserError, match=says):
        generate(config(server, tmp_path, **absent), silent)
    assert not server.asked


KEY = "sk-very-secret-0123456789"


def test_a_key_comes_from_the_environment_and_stands_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = {"key_env": "TOY_KEY"}
    with Server(key=KEY) as server:
        with pytest.raises(UserError, match="the environment has no TOY_KEY"):
            generate(config(server, tmp_path, model=model))
        monkeypatch.setenv("TOY_KEY", KEY + "x")
        with pytest.raises(UserError, match="401: the key in TOY_KEY is refused") as error:
            generate(config(server, tmp_path, model=model))
        assert not server.asked and KEY not in str(error.value)
        server.refuse_with = (400, f"what is {KEY}x?")
        with pytest.raises(UserError, match=r"20 requests in a row failed.*400 of .* what is") as error:
            generate(config(server, tmp_path, model=model))
        assert KEY not in str(error.value)
        server.refuse_with = (404, f"no model large for {KEY}x")
        with pytest.raises(UserError, match=r"large: 404 of .*no model large for") as error:
            generate(config(server, tmp_path, model=model, names=("large",)))
        assert KEY not in str(error.value)
        server.refuse_with = None
        monkeypatch.setenv("TOY_KEY", KEY)
        generate(config(server, tmp_path, model=model, tasks={}))  # all that there are
        assert len(server.paid) == 60
    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    printed = capfd.readouterr()
    assert len(written) > 5 and KEY.encode() not in b"".join(written) and KEY not in printed.out + printed.err


def test_a_request_is_given_up_after_its_attempts_and_asked_again_by_the_next_call(tmp_path: Path) -> None:
    with Server({"500": 0.3}) as server:
        generate(config(server, tmp_path, attempts=1, tasks={"question": 1.0}), silent)
        found = Counter(verdicts(tmp_path).values())
        assert found["no answer"] == sum(fault == "500" for fault in server.planted.values()) > 5
        generate(config(server, tmp_path, attempts=1, tasks={"question": 1.0}), silent)
        assert "no answer" not in Counter(verdicts(tmp_path).values()) and set(server.paid.values()) == {1}


def test_a_row_whose_document_the_embedder_does_not_find_is_left_out(tmp_path: Path) -> None:
    """The server's queries are made-up words: they share but common ones with their documents."""
    with Server() as server:
        options: dict[str, Any] = {"tasks": {"question": 1.0}, "embedder": "bm25"}
        generate(config(server, tmp_path, top_k=1000, **options), silent)
        assert set(verdicts(tmp_path).values()) <= {"accepted", "not found"}
        accepted = Counter(verdicts(tmp_path).values())["accepted"]
        generate(config(server, tmp_path, top_k=3, **options), silent)
        assert 0 < Counter(verdicts(tmp_path).values())["accepted"] < accepted / 2


def test_a_judge_leaves_out_rows_that_it_grades_otherwise(tmp_path: Path) -> None:
    """The server grades 5 or 0 by the digest: a quarter of the pairs has a good positive and a bad
    negative."""
    with Server() as server:
        judge = {"name": "judge", "base_url": server.url}
        tasks = {"question": 3.0, "topic": 1.0}
        generate(config(server, tmp_path, tasks=tasks), silent)
        generate(config(server, tmp_path, tasks=tasks, judge=judge, budget=0.0), silent)  # out of budget
        found = Counter(
            (line["task"], line["verdict"]) for line in lines(tmp_path / "out/datasets/verdicts.jsonl")
        )
        assert found.keys() == {("question", "not asked"), ("topic", "accepted")}
        generate(config(server, tmp_path, tasks=tasks, judge=judge), silent)
        found = Counter(
            (line["task"], line["verdict"]) for line in lines(tmp_path / "out/datasets/verdicts.jsonl")
        )
        assert found["topic", "judge"] == 0 < found["topic", "accepted"]
        assert 3 < found["question", "accepted"] < found["question", "judge"]
        assert server.paid.total() == 60 + 2 * (found["question", "accepted"] + found["question", "judge"])


def test_a_judge_grades_a_document_once_for_its_query(tmp_path: Path) -> None:
    with Server() as server:
        judge = {"name": "judge", "base_url": server.url}
        counts = generate(config(server, tmp_path, tasks={"document-question": 1.0}, judge=judge), silent)
    bodies = [
        json.loads(line["body"])
        for line in lines(tmp_path / "out/journal.jsonl")
        if line.get("model") == "judge"
    ]
    grades = Counter(json.loads(body["choices"][0]["message"]["content"])["grade"] for body in bodies)
    found = Counter(verdicts(tmp_path).values())
    assert found["accepted"] == counts["document-question"]["queries"] == grades[5] > 10
    assert found["judge"] == grades[0] > 10


def test_one_process_at_a_time_writes_into_a_folder(tmp_path: Path) -> None:
    from nemo_embed_core.files.lock import hold

    (tmp_path / "out").mkdir()
    descriptor = hold(tmp_path / "out")
    with Server() as server, pytest.raises(UserError, match="in use by another process"):
        generate(config(server, tmp_path))
    assert not server.asked and descriptor is not None


def test_outputs_that_share_a_journal_pay_once_and_one_at_a_time(tmp_path: Path) -> None:
    shared = str(tmp_path / "answers/journal.jsonl")
    with Server() as server:
        options = config(server, tmp_path, journal=shared, requests=12, tasks={"document-question": 1.0})
        generate(options, silent)
        asked = server.asked.total()
        assert asked == 12 and not (tmp_path / "out/journal.jsonl").exists()
        other = replace(options, output=str(tmp_path / "other"))
        with (tmp_path / "answers/lock").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            with pytest.raises(UserError, match="answers is in use by another process"):
                generate(other, silent)
        generate(other, silent)
        assert server.asked.total() == asked
    folders = [tmp_path / name / "datasets/document-question" for name in ("out", "other")]
    assert sha256_folder(folders[0]) == sha256_folder(folders[1])
