"""What a server's refusals cost, and where a key is masked."""

import asyncio

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


def endpoint(server: Server, key_env: str = "") -> Endpoint:
    return Endpoint(GeneratorConfig(name="m", base_url=server.url, key_env=key_env), GenerateConfig())


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
        client = endpoint(server)
        for status in statuses:
            server.refuse_with = status, "so it is"
            with pytest.raises(kind) as error:
                await client.complete(REQUEST)
            assert type(error.value) is kind and str(status) in str(error.value)
        await client.close()

    with Server() as server:
        asyncio.run(meet())


def test_a_key_is_masked_in_errors_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of one's own may have a word for a key, which answers have as well."""
    monkeypatch.setenv("TOY_KEY", "with")

    async def ask() -> Reply:
        client = endpoint(server, "TOY_KEY")
        reply = await client.complete(REQUEST)
        server.refuse_with = 400, "no one with this key"
        with pytest.raises(Unfit, match=r"no one \*\*\* this key"):
            await client.complete(REQUEST)
        await client.close()
        return reply

    with Server(key="with") as server:
        reply = asyncio.run(ask())
        assert reply.body == server.memory[REQUEST.digest] and " with " in reply.body
