"""Clients that stream completions of the demo model without a pause, and compare every answer with the known one.

For disagg_kill.py and tests/e2e. Prompts are conversations of the model's corpus, as token ids. A cache salt of its
own keeps most requests from finding their prompt in a prefix cache, so that there is something to compute and to move.
"""

import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from _cluster import MODEL

from kvstore.text import Tokenizer

PATIENCE_S = 90.0
"""An answer that takes longer hangs, which is a failure."""
_RETRY_S = 0.2


def make_prompts(count: int, longest: int, seed: int = 7) -> list[list[int]]:
    """Prompts of 1 to `longest` tokens, more short than long ones."""
    sys.path.insert(0, str(MODEL / "train"))
    from corpus import render, sample

    tokenizer = Tokenizer.from_files({"tokenizer.json": (MODEL / "1" / "model" / "tokenizer.json").read_bytes()})
    rng = random.Random(seed)

    def tokens(wanted: int) -> list[int]:
        made: list[int] = []
        while len(made) < wanted:
            made += np.frombuffer(tokenizer.encode(render(sample(rng))), "<u4").tolist()
        return made[:wanted]

    return [tokens(max(1, longest * number**3 // (count - 1) ** 3)) for number in range(count)]


@dataclass
class Answer:
    """One request and what came of it."""

    prompt: int
    text: str = ""
    times_s: list[float] = field(default_factory=list)
    """When its events with text came, monotonic. The first is the prefill worker's, where there was one."""
    status: int = 0
    error: str = ""
    """What the client was told, or what broke off."""
    instance: str = ""
    prefill_instance: str = ""
    """Where it ran when its first token came."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def events(self) -> int:
        """Those with text."""
        return len(self.times_s)

    @property
    def longest_gap_s(self) -> float:
        """Between two events with text."""
        return max((after - before for before, after in pairwise(self.times_s)), default=0.0)


class Client:
    """Asks a router. The answers that are known are the ones to expect."""

    def __init__(self, base: str, prompts: list[list[int]], max_tokens: int) -> None:
        self._host, port = base.removeprefix("http://").split(":")
        self._port = int(port)
        self.prompts = prompts
        self._max_tokens = max_tokens
        self._salts = 0
        self.known: list[str] = []

    def body(self, prompt: int) -> bytes:
        """Some prompts end sooner than others."""
        self._salts += 1
        options = {"temperature": 0, "ignore_eos": True, "max_tokens": self._max_tokens - prompt % 17, "stream": True}
        salt = {"cache_salt": f"salt-{self._salts}"} if self._salts % 4 else {}
        return json.dumps({"model": "demo", "prompt": self.prompts[prompt], **options, **salt}).encode()

    async def learn(self, at_once: int) -> None:
        """Take what the cluster answers now as the known answers."""
        turn = asyncio.Semaphore(at_once)

        async def ask(prompt: int) -> str:
            async with turn:
                answer = await self.ask(Answer(prompt))
            if answer.error or not answer.text:
                raise SystemExit(f"a prompt of {len(self.prompts[prompt])} tokens was not answered: {answer.error}")
            return answer.text

        self.known = await asyncio.gather(*map(ask, range(len(self.prompts))))

    async def ask(self, answer: Answer) -> Answer:
        """Fill the answer in. Never raises for what the other side does."""
        try:
            await asyncio.wait_for(self._ask(answer), PATIENCE_S)
        except asyncio.TimeoutError:
            answer.error = f"no end within {PATIENCE_S:g} s"
        except (OSError, asyncio.IncompleteReadError) as error:
            answer.error = f"broke off: {error!r}"
        finally:
            answer.ended.set()
        return answer

    async def open(self, prompt: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A request that was sent; closing the writer is the client's leave."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        body = self.body(prompt)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        return reader, writer

    async def _ask(self, answer: Answer) -> None:
        reader, writer = await self.open(answer.prompt)
        try:
            headers = await _read_head(reader)
            answer.status = int(headers[""].split()[1])
            answer.instance = headers.get("x-dynamo-instance", "")
            answer.prefill_instance = headers.get("x-dynamo-prefill-instance", "")
            if answer.status != 200:
                answer.error = (await reader.readexactly(int(headers["content-length"]))).decode()
                return
            async for event in _events(reader):
                _take(answer, event)
        finally:
            writer.close()


def _take(answer: Answer, event: str) -> None:
    if event == "[DONE]":
        return
    document = json.loads(event)
    if "error" in document:
        answer.error = f"{document['error']['code']}: {document['error']['message']}"
        return
    for choice in document["choices"]:
        if choice["text"]:
            answer.text += choice["text"]
            answer.times_s.append(time.monotonic())


async def _read_head(reader: asyncio.StreamReader) -> dict[str, str]:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    pairs = (line.partition(":") for line in lines if line)
    return {"": first, **{name.lower(): value.strip() for name, _, value in pairs}}


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[str]:
    """The data of each server-sent event of a chunked body, to its end."""
    kept = b""
    while size := int(await reader.readline(), 16):
        kept += (await reader.readexactly(size + 2))[:-2]
        *whole, kept = kept.split(b"\n\n")
        for event in whole:
            yield event.decode().removeprefix("data: ")


class Load:
    """So many clients, each with one request after the other. Use as an async context manager: it lets all end."""

    def __init__(self, client: Client, clients: int, answers: list[Answer], seed: int) -> None:
        self._client, self._clients, self._answers = client, clients, answers
        self._rng = random.Random(seed)
        self._stopping = False
        self.open: set[int] = set()
        """Indexes of answers that have not ended."""

    async def __aenter__(self) -> "Load":
        self._tasks = [asyncio.create_task(self._run()) for _ in range(self._clients)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def _run(self) -> None:
        while not self._stopping:
            number = len(self._answers)
            answer = Answer(self._rng.randrange(len(self._client.prompts)))
            self._answers.append(answer)
            self.open.add(number)
            await self._client.ask(answer)
            self.open.remove(number)
            if answer.error:
                await asyncio.sleep(_RETRY_S)
