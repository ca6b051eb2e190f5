"""Requests in flight, as many at once as each generator allows: retried, journalled, and within the budget.

failed = asyncio.run(ask(requests_of, generators, journal, config, log))     # {digest: why}
"""

from __future__ import annotations

import asyncio
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from nemo_embed_core.config.synthesize import GenerateConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.synthesize.client import Failed, Generator, Refused, Request, Unfit, worst
from nemo_embed_core.synthesize.journal import Journal

MAX_BACKOFF_S = 60.0
IN_A_ROW = 20  # requests of a generator that fail for good, before it is not asked again
PROGRESS_S = 30.0
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(UserError):
    """By a signal, with a shell's exit code of it: 128 + its number."""

    def __init__(self, number: int, message: str):
        super().__init__(f"stopped by {signal.Signals(number).name}: {message}")
        self.exit_code = 128 + number


class Asking:
    """Its end, whatever the reason, waits for those in flight: what is paid for is heard."""

    def __init__(self, journal: Journal, config: GenerateConfig, log: Callable[[str], None]):
        self.journal, self.config, self.log = journal, config, log
        self.failed: dict[str, str] = {}
        self.error: Exception | None = None
        self.signal: int | None = None
        self.is_out_of_budget = False
        self._in_flight = 0
        self._ended = asyncio.Event()  # set, and replaced, whenever one of those in flight has ended
        self._stopping = asyncio.Event()
        self._said = time.monotonic()

    def _stop(self, error: Exception | None = None) -> None:
        self.error = self.error or error
        self._stopping.set()

    @contextmanager
    def heeding_signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM sends nothing more, the second gives up what is in flight, too."""
        if threading.current_thread() is not threading.main_thread():  # which alone may have handlers
            yield
            return
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def heed(number: int) -> None:
            if self.signal is not None:
                task.cancel()
                return
            self.signal = number
            self._stop()
            self.log(
                f"{signal.Signals(number).name}: nothing more is sent; waiting at most "
                f"{self.config.timeout_s:g} s for {self._in_flight} that are. A second signal gives them up"
            )

        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            loop.add_signal_handler(number, heed, number)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    async def _sleep(self, seconds: float) -> None:
        """Shorter where the end comes."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    async def _has_room(self, cost: float) -> bool:
        """Once it fits: `spent` has everything in flight at its worst. False where it never will."""
        while self.config.budget is not None and self.journal.spent + cost > self.config.budget:
            if not self._in_flight:
                self.is_out_of_budget = True
                self._stop()
                return False
            await self._ended.wait()
        return not self._stopping.is_set()

    async def one(self, generator: Generator, request: Request) -> bool | None:
        """Whether it was answered; None where the end came first."""
        digest, cost, why = request.digest, worst(generator.config, request), ""
        tokens = len(request.prompt.encode()) // 4 + request.max_output
        for attempt in range(self.config.attempts):
            wait = generator.limiter.take(time.monotonic(), tokens)
            while wait > 0 and not self._stopping.is_set():
                await self._sleep(wait)
                wait = generator.limiter.paused(time.monotonic())
            if not await self._has_room(cost):
                return None
            # No await between the look at the budget and this line: nobody else takes the room.
            self.journal.sent(digest, cost)
            self._in_flight += 1
            backoff = min(MAX_BACKOFF_S, self.config.backoff_s * 2**attempt) * random.uniform(0.5, 1.5)
            try:
                reply = await generator.complete(request)
            except Failed as error:
                note = self.journal.refused if isinstance(error, Refused) else self.journal.lost
                note(digest, why := str(error))
                if error.wait_s is not None:
                    backoff = 0.0
                    generator.limiter.pause(time.monotonic(), error.wait_s)
            except Unfit as error:
                self.journal.refused(digest, str(error))
                self.failed[digest] = f"{generator.config.name}: {error}"
                return False
            except UserError as error:
                self.journal.refused(digest, str(error))
                self._stop(error)
                return None
            except Exception as error:  # of ours or a library's: it may have been sent
                self.journal.lost(digest, f"{type(error).__name__}: {error}")
                raise
            else:
                self.journal.reply(digest, reply)
                return True
            finally:
                self._in_flight -= 1
                self._ended.set()
                self._ended = asyncio.Event()
            if attempt + 1 < self.config.attempts:
                await self._sleep(backoff)
        self.failed[digest] = f"{why}, {self.config.attempts} times"
        return False

    async def all_of(self, generator: Generator, requests: Iterator[Request]) -> None:
        in_a_row = 0

        async def in_turn() -> None:
            nonlocal in_a_row
            for request in requests:  # one iterator: each request is taken once
                if self.journal.has(request.digest):
                    continue
                if self._stopping.is_set() or (answered := await self.one(generator, request)) is None:
                    return
                in_a_row = 0 if answered else in_a_row + 1
                if in_a_row >= IN_A_ROW:
                    why = self.failed[request.digest]
                    self._stop(UserError(f"{in_a_row} requests in a row failed, the last one: {why}"))
                if time.monotonic() - self._said > PROGRESS_S:
                    self._said = time.monotonic()
                    self.log(f"{len(self.journal):,} replies, {self.journal.spent:.2f} spent")

        async def worker() -> None:
            try:
                await in_turn()
            except Exception as error:  # past the task group, which would cancel what others have in flight
                self._stop(error)

        async with asyncio.TaskGroup() as group:
            for _ in range(generator.config.max_in_flight):
                group.create_task(worker())


async def ask(
    requests_of: Sequence[Iterator[Request]],
    generators: Sequence[Generator],
    journal: Journal,
    config: GenerateConfig,
    log: Callable[[str], None] = print,
) -> dict[str, str]:
    """Every request that the journal has no reply of. requests_of: of each generator.

    UserError for a key that is refused, a model that is not there, a generator that always fails; Stopped by
    SIGINT or SIGTERM; any other error as it came. All of them after those in flight are in the journal. Out
    of budget it ends after those in flight, and says so: what was answered is there. Returns why, by digest,
    for those that failed for good.
    """
    asking = Asking(journal, config, log)
    try:
        with asking.heeding_signals():
            async with asyncio.TaskGroup() as group:
                for generator, requests in zip(generators, requests_of, strict=True):
                    group.create_task(asking.all_of(generator, requests))
    except asyncio.CancelledError:
        if asking.signal is None:  # another's cancellation
            raise
    finally:
        for generator in generators:
            await generator.close()
    if asking.error is not None:
        raise asking.error
    if asking.signal is not None:
        raise Stopped(
            asking.signal,
            f"{journal.path} has {len(journal):,} replies, {journal.spent:.4f} spent at most; the same "
            "command goes on",
        )
    if asking.is_out_of_budget:
        log(
            f"the budget of {config.budget:g} is used up: {journal.spent:.4f} spent at most, "
            f"{len(journal):,} replies; with a higher generate.budget the same command goes on"
        )
    return asking.failed
