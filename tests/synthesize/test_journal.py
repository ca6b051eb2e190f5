"""The journal after each way to end, what counts as spent, and how fast a generator is asked."""

import hashlib
import json
from pathlib import Path

import pytest

from nemo_embed_core.errors import DataError
from nemo_embed_core.synthesize.client import Limiter, retry_after
from nemo_embed_core.synthesize.journal import Journal, Reply

REPLY = Reply("m", '{"é": "text"}', (10, 20), 0.25)


def test_spent_is_the_cost_of_replies_and_the_worst_of_what_is_not_known(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    for key, worst in (("a", 1.0), ("b", 2.0), ("c", 4.0), ("d", 8.0)):
        journal.sent(key, worst)
    assert journal.spent == 15.0
    journal.reply("a", REPLY)
    journal.refused("b", "429")
    journal.lost("c", "timed out")
    journal.sent("b", 2.0)
    journal.reply("b", REPLY)
    assert journal.spent == 0.25 + 0.25 + 4.0 + 8.0 and journal.tokens == [20, 40]
    journal.close()
    again = Journal(tmp_path / "j")
    assert (again.spent, again.tokens, len(again)) == (12.5, [20, 40], 2)
    assert again.get("b") == REPLY and [again.has(key) for key in "abcde"] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_a_cut_last_line_is_left_out_at_every_length(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.sent("a", 1.0)
    journal.reply("a", REPLY)
    journal.sent("b", 1.0)
    whole = (tmp_path / "j").read_bytes()
    journal.reply("b", REPLY)
    data = (tmp_path / "j").read_bytes()
    for size in range(len(whole) + 1, len(data)):
        (tmp_path / "j").write_bytes(data[:size])
        said: list[str] = []
        cut = Journal(tmp_path / "j", said.append)
        assert cut.has("a") and not cut.has("b") and cut.spent == 1.25 and len(said) == 1
        cut.reply("b", REPLY)  # goes on where the last whole line ends
        cut.close()
        assert (tmp_path / "j").read_bytes() == data


@pytest.mark.parametrize(
    "change", [("text", "texd"), ("reply", "replied"), ('"worst"', '"wurst"'), ("{", "[")]
)
def test_a_damaged_line_is_named(tmp_path: Path, change: tuple[str, str]) -> None:
    journal = Journal(tmp_path / "j")
    journal.sent("a", 1.0)
    journal.reply("a", REPLY)
    (tmp_path / "j").write_text((tmp_path / "j").read_text().replace(*change))
    with pytest.raises(DataError, match=r"j:[12]: is damaged .*: restore the file, or delete this line"):
        Journal(tmp_path / "j")


def test_a_line_is_an_event_with_the_raw_response_and_its_digest(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.sent("a", 1.0)
    journal.reply("a", REPLY)
    line = json.loads((tmp_path / "j").read_text().splitlines()[1])
    assert line["body"] == REPLY.body
    assert line["sha256"] == hashlib.sha256(REPLY.body.encode()).hexdigest()


def test_requests_and_tokens_are_spaced_and_a_pause_is_for_all() -> None:
    limiter = Limiter(requests_per_minute=120, tokens_per_minute=6000)  # 0.5 s a request, 10 ms a token
    assert limiter.take(100.0, 20) == 0.0  # next: 100.5 by requests, 100.2 by tokens
    assert limiter.take(100.0, 300) == 0.5  # next: 101.0 by requests, 103.5 by tokens
    assert limiter.take(101.0, 10) == 2.5
    assert limiter.take(200.0, 10) == 0.0  # what was not used is no credit
    limiter.pause(200.0, 30.0)
    limiter.pause(200.0, 5.0)
    assert limiter.take(201.0, 10) == 29.0 and limiter.paused(229.0) == 1.0
    assert Limiter(0, 0).take(5.0, 10**9) == 0.0


@pytest.mark.parametrize(
    "headers, seconds",
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry-after": "Wed, 21 Oct 2065 07:28:00 GMT"}, 600.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after-ms": "nan"}, None),
        ({"retry-after": "99999999"}, 600.0),
    ],
)
def test_retry_after_is_read_as_number_and_as_date(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds
