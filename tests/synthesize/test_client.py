"""What a server's refusals cost, and where a key is masked."""

import asyncio
from contextlib import suppress

import pytest

from benchmarks.synthesis_server import Server
from nemo_embed_core.config import GenerateConfig, GeneratorConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.synthesize.client import Endpoint, Lost, Refused, Request, Unfit
from nemo_embed_core.synthesize.journal import Reply

pytest.importorskip("openai", reason="the extra [synthesize] (openai) is not installed")

PROMPT = """Write for a nurse. The query has 6 to 14 words. Each text has 20 to 30 words.
All texts are in English. Answer with one JSON object and nothing else: {"query": "...", "positive": "..."}"""
REQUEST = Request("m", PROMPT, {"max_tokens": 50})


def endpoint(url: str, key_env: str = "", timeout_s: float = 60.0) -> Endpoint:
    model = GeneratorConfig(name="m", base_url=url, key_env=key_env)
    return Endpoint(model, GenerateConfig(timeout_s=timeout_s))


@pytest.mark.parametrize(
    "kind, statuses",
    [
        (Refused, (409, 425, 429, 503)),  # the server says that it has not taken the request
        (Lost, (408, 500, 501, 502, 504, 520, 529)),  # a proxy may have given up on a model that answers
        (Unfit, (400, 413, 422)),
        (UserError, (401, 403, 404)),
    ],
)
def test_only_what_a_server_has_not_taken_is_unpaid(kind: type[Exception], statuses: tuple[int, ...]) -> None:
    async def meet() -> None:
        client = endpoint(server.url)
        for status in statuses:
            server.refuse_with = status, "so it is"
            with pytest.raises(kind) as error:
                await client.complete(REQUEST)
            assert type(error.value) is kind and str(status) in str(error.value)
        await client.close()

    with Server() as server:
        asyncio.run(meet())


def test_an_answer_that_drips_is_lost_after_its_time() -> None:
    async def drip(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 X\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n")
        with suppress(ConnectionError):
            for _ in range(50):  # each well within the time
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.1)
        writer.close()

    async def ask() -> None:
        server = await asyncio.start_server(drip, "127.0.0.1", 0)
        client = endpoint(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", timeout_s=1.0)
        with pytest.raises(Lost, match="no whole answer in 1 s"):
            await client.complete(REQUEST)
        await client.close()
        server.close()

    asyncio.run(ask())


def test_a_key_is_masked_in_errors_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of one's own may have a word for a key, which answers have as well."""
    monkeypatch.setenv("TOY_KEY", "with")

    async def ask() -> Reply:
        client = endpoint(server.url, "TOY_KEY")
        reply = await client.complete(REQUEST)
        server.refuse_with = 400, "no one with this key"
        with pytest.raises(Unfit, match=r"no one \*\*\* this key"):
            await client.complete(REQUEST)
        await client.close()
        return reply

    with Server(key="with") as server:
        reply = asyncio.run(ask())
        assert reply.body == server.memory[REQUEST.digest] and " with " in reply.body
