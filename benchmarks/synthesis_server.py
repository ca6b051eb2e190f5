"""An endpoint of the OpenAI protocol on this machine: it answers as it is asked, or misbehaves as it is told.

with Server(faults={"429": 0.05, "refusal": 0.02}) as server:
    server.url; server.paid[digest]; server.planted[digest]

It knows a request by its prompt alone, as a model does, and shares no code with the package. Answers are
made-up words around the common words of the language, a pure function of the request: a run that is
killed and resumed can be compared with one that was not.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any, Self

# On the way: the first attempt of a request fails so, the second is answered.
ON_THE_WAY = ("timeout", "429", "429 without Retry-After", "500", "cut", "half JSON")
# In the answer, and the reason that it should be left out for.
IN_THE_ANSWER = {
    "refusal": "refusal", "polite refusal": "refusal", "filtered": "refusal", "prose": "not JSON",
    "empty": "not JSON", "missing field": "fields", "number for text": "fields", "too long": "length",
    "other language": "language", "copied query": "copy", "names the document": "document",
    "longest length": "cut", "duplicate": "duplicate",
}  # fmt: skip
COMMON = {
    "English": "the of that with from which they", "German": "der und nicht ein sich auch wird",
    "French": "les des dans pour avec elle sont", "Russian": "что как это для или при был",
}  # fmt: skip
SYLLABLES = {
    "Latin": ["ba", "du", "ke", "li", "mo", "ra", "sen", "tir", "vol", "gan",
              "pel", "nor", "dix", "fam", "hu", "jes", "kov", "wim", "zar", "que"],
    "Cyrillic": ["ба", "ду", "ке", "ли", "мо", "ра", "сен", "тир", "вол", "ган",
                 "пел", "нор", "дик", "фам", "ху", "жес", "ков", "вим", "зар", "ше"],
}  # fmt: skip


class Server:
    """faults: share of the requests of each. remembers: a known Idempotency-Key is answered as before,
    unpaid.  delay_s: of each answer. key: that a request must have.

    paid: by digest, answers that were made.  in_flight, most_in_flight: requests.  asked: attempts by digest.
    """

    def __init__(
        self,
        faults: Mapping[str, float] | None = None,
        remembers: bool = False,
        delay_s: float = 0.0,
        key: str = "",
        retry_after: str = "0",
    ):
        self.faults, self.remembers, self.delay_s, self.key = dict(faults or {}), remembers, delay_s, key
        self.retry_after = retry_after
        self.paid, self.asked, self.planted = Counter[str](), Counter[str](), dict[str, str]()
        self.in_flight = self.most_in_flight = 0
        self.refuse_with: tuple[int, str] | None = None  # (status, message) for everyone
        self.answers: dict[tuple[str, ...], str] = {}  # the first one to each form of prompt
        self.memory: dict[str, str] = {}
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, *_: Any) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        self._started.set()
        await self._stop.wait()
        server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                headers = dict(re.findall(r"^([\w-]+): *(.*?)\r$", head.lower(), re.M))
                body = json.loads(await reader.readexactly(int(headers["content-length"])))
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                if not await self._respond(reader, writer, headers, body):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _respond(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, headers: Any, body: Any
    ) -> bool:
        digest, prompt = headers["idempotency-key"], body["messages"][0]["content"]
        if self.refuse_with or (self.key and headers["authorization"] != f"bearer {self.key}".lower()):
            status, message = self.refuse_with or (401, f"Incorrect API key: {headers['authorization']}")
            await self._send(writer, status, json.dumps({"error": {"message": message}}))
            return True
        if body["model"] == "absent":
            await self._send(writer, 404, '{"error": {"message": "there is no such model"}}')
            return True
        self.asked[digest] += 1
        if self.remembers and digest in self.memory:
            await self._send(writer, 200, self.memory[digest])
            return True
        rng = random.Random(digest)
        fault = next(
            iter(rng.choices([*self.faults, ""], [*self.faults.values(), 1 - sum(self.faults.values())]))
        )
        self.planted[digest] = fault
        if fault in ON_THE_WAY and self.asked[digest] == 1:
            if fault == "timeout":
                await reader.read()  # until the client gives up
                self.in_flight -= 1
                return False
            return await self._fail(writer, fault)
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        content, ends, is_planted = self._content(body, rng, fault)
        if fault in IN_THE_ANSWER and not is_planted:
            self.planted[digest] = ""
        self.paid[digest] += 1
        message = {"role": "assistant", "content": content}
        usage = {"prompt_tokens": len(prompt) // 4, "completion_tokens": len(content or "") // 4}
        choices = [{"index": 0, "message": message, "finish_reason": ends}]
        self.memory[digest] = json.dumps({"id": "x", "choices": choices, "usage": usage}, ensure_ascii=False)
        await self._send(writer, 200, self.memory[digest])
        return True

    async def _send(
        self, writer: asyncio.StreamWriter, status: int, text: str, more: str = "", cut: int = 0
    ) -> None:
        """cut: bytes that are announced and never come."""
        self.in_flight -= 1
        data = text.encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{more}"
        writer.write(f"{head}Content-Length: {len(data) + cut}\r\n\r\n".encode() + data)
        await writer.drain()

    async def _fail(self, writer: asyncio.StreamWriter, fault: str) -> bool:
        """Whether the connection goes on."""
        if fault.startswith("429"):
            more = "" if "without" in fault else f"Retry-After: {self.retry_after}\r\n"
            await self._send(writer, 429, '{"error": {"message": "slow down"}}', more)
        elif fault == "500":
            await self._send(writer, 500, "oops")
        elif fault == "cut":
            await self._send(writer, 200, '{"choices": [{"mess', cut=400)
            return False
        else:
            await self._send(writer, 200, '{"choices": [{"mess')
        return True

    # -------------------------------------------------------------------------------------- what it says

    def _content(self, body: Any, rng: random.Random, fault: str) -> tuple[str, str, bool]:
        """(text, finish_reason, whether the fault is in it: not every answer can have each)."""
        prompt: str = body["messages"][0]["content"]
        if fault == "refusal":
            return "I'm sorry, but I can't help with that request.", "stop", True
        if fault == "prose":
            return (
                "Sure! Here is a nice example of what you asked for: " + _text(rng, 12, "English"),
                "stop",
                True,
            )
        if fault == "empty":
            return " ", "stop", True
        if fault == "filtered":
            return "", "content_filter", True
        if prompt.startswith("Does the document help"):
            return json.dumps({"grade": rng.choice((0, 5))}), "stop", False
        value = self._answer(prompt, rng, body["model"])
        names, before = [name for name in value if name not in ("label", "grade")], dict(value)
        if fault == "polite refusal":
            value[names[0]] = "I cannot assist with writing this."
        elif fault == "missing field":
            del value[rng.choice(list(value))]
        elif fault == "number for text":
            value[rng.choice(names)] = 7
        elif fault == "too long":
            value[names[0]] = " ".join([value[names[0]]] * 9)
        elif fault == "other language":
            wrong = "English" if re.search("[а-я]", value[names[0]]) else "Russian"
            value[names[0]] = _text(rng, len(value[names[0]].split()), wrong)
        elif fault == "copied query" and "positive" in value:
            value["positive"] = f"{value['positive']} {value['query']}"
        elif fault == "copied query" and "first" in value and "grade" in value:
            value["second"] = value["first"].upper()
        elif fault == "names the document" and "query" in value:
            value["query"] = f"{value['query']} in this document"
        elif fault == "duplicate":
            form = re.findall(
                r"\d+ to \d+ words|(?:texts are|same|`text`,) in \w+|is \"[^\"]*\"|here \d", prompt
            )
            value = json.loads(self.answers.setdefault((prompt[:120], *form), json.dumps(value)))
        text = json.dumps(value, ensure_ascii=False)
        if rng.random() < 0.2:
            text = f"```json\n{text}\n```"
        return text, "length" if fault == "longest length" else "stop", value != before or "longest" in fault

    def _answer(self, prompt: str, rng: random.Random, model: str) -> dict[str, Any]:
        """What the prompt asks for, read as a person would."""
        value: dict[str, Any] = json.loads(prompt.splitlines()[-1].split("nothing else: ")[1])
        said = re.search(r"All texts are in (\w+)\.", prompt)
        pair = re.search(r"Write `text`, in (\w+), and `translation`, the same in (\w+)", prompt)
        language = said[1] if said else pair[1] if pair else "English"
        ranges = [(int(a), int(b)) for a, b in re.findall(r"(\d+) to (\d+) words", prompt)]
        for name in value:
            low, high = ranges[-1] if name in ("positive", "hard_negative", "first", "second") else ranges[0]
            value[name] = _text(rng, rng.randint(low, high), language)
        if pair:
            value["translation"] = _text(rng, len(value["text"].split()), pair[2])
        if "label" in value:
            value["label"] = re.findall(r'`label` is "([^"]+)"', prompt)[0]
        if "grade" in value:
            value["grade"] = int(re.findall(r"here (\d)", prompt)[0])
        return value


def _text(rng: random.Random, count: int, language: str) -> str:
    """count words, half of them made up, with one common word of the language in four."""
    syllables = SYLLABLES["Cyrillic" if language == "Russian" else "Latin"]
    common = COMMON[language].split()
    words = [
        rng.choice(common) if i % 4 == 1 else "".join(rng.choices(syllables, k=rng.randint(2, 4)))
        for i in range(count)
    ]
    return " ".join(words).capitalize() + "."
