"""Generators: any OpenAI-compatible endpoint through the openai library, and how fast it may be asked.

reply = await endpoint.complete(request)      # one attempt; else Refused, Lost, Unfit or UserError

Retries, budget and journal are ask.py's; local.py has a model on this machine under the same names. A key is
read from the environment, and is masked in what a server's errors say; answers stay as they came.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Any, Protocol

from nemo_embed_core.config.synthesize import GenerateConfig, GeneratorConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.strict_json import parse
from nemo_embed_core.synthesize.journal import Reply

MAX_WAIT_S = 600.0  # that a Retry-After is believed
# The server has not taken the request, it says. Of every other failure it may have been answered, and paid.
NOT_TAKEN = (409, 425, 429, 503)


@dataclass(frozen=True)
class Request:
    """parameters: as the protocol calls them."""

    model: str
    prompt: str
    parameters: dict[str, Any]

    @cached_property
    def digest(self) -> str:
        """Of all that decides the answer; not of where the model runs. Its name in the journal."""
        sent = [self.model, self.prompt, self.parameters]
        return hashlib.sha256(json.dumps(sent, sort_keys=True).encode()).hexdigest()

    @property
    def max_input(self) -> int:
        """Tokens of the prompt at most: no tokenizer makes more than one of a byte; and a template's."""
        return len(self.prompt.encode()) + 64

    @property
    def max_output(self) -> int:
        value: int = self.parameters.get("max_tokens") or self.parameters["max_completion_tokens"]
        return value


class Failed(Exception):
    """No answer: another attempt may have one. wait_s: what the server asks for, None: it does not say."""

    def __init__(self, why: str, wait_s: float | None = None):
        super().__init__(why)
        self.wait_s = wait_s


class Refused(Failed):
    """Not taken, and not paid."""


class Lost(Failed):
    """Perhaps paid."""


class Unfit(Exception):
    """This request is refused and others may not be."""


class Generator(Protocol):
    config: GeneratorConfig
    limiter: Limiter

    async def complete(self, request: Request) -> Reply: ...

    async def close(self) -> None: ...


def cost(config: GeneratorConfig, tokens: tuple[int, int]) -> float:
    return (tokens[0] * config.input_price + tokens[1] * config.output_price) / 1e6


def worst(config: GeneratorConfig, request: Request) -> float:
    """What it can cost at most."""
    return cost(config, (request.max_input, request.max_output))


class Limiter:
    """Requests and tokens per minute, evenly spaced. Tokens are counted as endpoints count them: the prompt's
    (4 bytes each) and all that the answer may have."""

    def __init__(self, requests_per_minute: int, tokens_per_minute: int):
        self._s_per_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self._s_per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._next_request = self._next_token = self._paused_until = -math.inf

    def take(self, now: float, tokens: int) -> float:
        """Seconds to wait before it is sent; its place is taken."""
        at = max(now, self._next_request, self._next_token)
        self._next_request = at + self._s_per_request
        self._next_token = at + tokens * self._s_per_token
        return max(at, self._paused_until) - now

    def paused(self, now: float) -> float:
        """Seconds that a pause still lasts."""
        return self._paused_until - now

    def pause(self, now: float, seconds: float) -> None:
        """A limit of the server's is one of the model: everyone waits."""
        self._paused_until = max(self._paused_until, now + seconds)


class Endpoint:
    def __init__(self, config: GeneratorConfig, options: GenerateConfig):
        try:
            import openai
        except ImportError:
            raise UserError(
                "generate.models with a base_url are asked through the openai library, which is not "
                "installed: pip install 'nemo_embed_core[synthesize]' or 'openai>=3,<4'"
            ) from None
        self.config, self._openai = config, openai
        self._key = os.environ.get(config.key_env, "") if config.key_env else "none"
        if not self._key:
            raise UserError(
                f"generate.models: {config.name}: the environment has no {config.key_env}; set it, "
                'or key_env to "" for a server without keys'
            )
        self.limiter = Limiter(config.requests_per_minute, config.tokens_per_minute)
        self._timeout_s = options.timeout_s
        # The library's are of each read: an answer that drips would never end. Connections fail before the
        # whole does, as without one nothing can have been paid.
        timeout = openai.Timeout(options.timeout_s, connect=options.timeout_s / 2)
        self._client = openai.AsyncOpenAI(
            api_key=self._key, base_url=config.base_url, timeout=timeout, max_retries=0
        )

    async def complete(self, request: Request) -> Reply:
        name, create = self.config.name, self._client.chat.completions.with_raw_response.create
        messages: Any = [{"role": "user", "content": request.prompt}]
        try:
            async with asyncio.timeout(self._timeout_s):
                raw: Any = await create(
                    model=request.model, messages=messages, extra_headers={"Idempotency-Key": request.digest},
                    **request.parameters,
                )  # fmt: skip
            body = raw.http_response.text
        except TimeoutError:
            raise Lost(f"{name}: no whole answer in {self._timeout_s:g} s") from None
        except self._openai.APIStatusError as error:
            raise self._failure(error) from None
        except self._openai.APIConnectionError as error:  # timed out, too
            why = type(error.__cause__ or error).__name__
            if why in ("ConnectError", "ConnectTimeout", "PoolTimeout"):
                raise Refused(f"{name}: no connection ({why})") from None
            raise Lost(f"{name}: {why}") from None
        try:
            value = parse(body)
            tokens = tuple(int(value["usage"][f"{kind}_tokens"]) for kind in ("prompt", "completion"))
        except (ValueError, RecursionError):
            raise Lost(f"{name}: the response is no JSON: cut?") from None
        except (KeyError, TypeError):  # a server that does not count
            tokens = (request.max_input, request.max_output)
        return Reply(name, body, tokens, cost(self.config, tokens))  # type: ignore[arg-type]  # two of them

    def _failure(self, error: Any) -> Exception:
        code, name = error.status_code, self.config.name
        if code in (401, 403):
            why = f"the key in {self.config.key_env} is refused" if self.config.key_env else "set key_env"
            return UserError(f"generate.models: {name}: {code}: {why}")
        said = f"{code} of {self.config.base_url}: {self._hidden(error.message)}"[:300]
        if code == 404:
            return UserError(f"generate.models: {name}: {said}")
        if code in NOT_TAKEN:
            return Refused(f"{name}: {code}", retry_after(error.response.headers))
        if code == 408 or code >= 500:
            return Lost(f"{name}: {code}", retry_after(error.response.headers))
        return Unfit(said)

    def _hidden(self, text: str) -> str:
        """A server's error without the key: some say it again."""
        return text.replace(self._key, "***") if self.config.key_env else text

    async def close(self) -> None:
        await self._client.close()


def retry_after(headers: Any) -> float | None:
    """Seconds of Retry-After (a number or a date) or retry-after-ms; None: there is none that is sane."""
    try:
        if value := headers.get("retry-after-ms"):
            seconds = float(value) / 1000
        elif value := headers.get("retry-after"):
            seconds = (
                float(value) if value[0].isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
            )
        else:
            return None
    except ValueError:
        return None
    return min(max(seconds, 0.0), MAX_WAIT_S) if math.isfinite(seconds) else None
