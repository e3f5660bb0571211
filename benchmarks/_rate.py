"""Streams at a fixed rate, and the time to the first token of each. For router.py.

Requests are sent at their times whatever has come of those before, so a slow system gets no rest.
"""

import asyncio
import json
import time
from urllib.parse import urlsplit

import numpy as np

TIMEOUT_S = 30.0


async def ttft_at_rate(base: str, rate: float, seconds: float, tokens: int, salt: int) -> tuple[float, float]:
    """p50 and p99 in milliseconds, of chats that begin alike. Raises `SystemExit` where one fails."""
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    tasks = []
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, began_s + number / rate - loop.time()))
        tasks.append(asyncio.create_task(_ttft_ms(base, _body(tokens, salt, number))))
    times = await asyncio.wait_for(asyncio.gather(*tasks), TIMEOUT_S)
    p50, p99 = np.quantile(times[len(times) // 10 :], (0.5, 0.99))
    return float(p50), float(p99)


def _body(tokens: int, salt: int, number: int) -> bytes:
    messages = [
        {"role": "system", "content": "You are a helpful assistant who answers in one sentence. " * 11},
        {"role": "user", "content": f"{salt}-{number}: " + "What is the capital of France, and what is 12 + 30? " * 4},
    ]
    options = {"max_tokens": tokens, "stream": True, "temperature": 0, "ignore_eos": True}
    return json.dumps({"model": "demo", "messages": messages, **options}).encode()


async def _ttft_ms(base: str, body: bytes) -> float:
    address = urlsplit(base)
    began_s = time.perf_counter()
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
        )
        writer.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        seen = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in seen.split(b"\r\n", 1)[0]:
            raise SystemExit(f"a request was refused: {seen[:80]!r}")
        while not _has_text(line := await reader.readline()):
            if not line:
                raise SystemExit("a stream ended without a text")
        first_ms = 1e3 * (time.perf_counter() - began_s)
        await reader.read()
        return first_ms
    finally:
        writer.close()


def _has_text(line: bytes) -> bool:
    if not line.startswith(b"data: {"):
        return False
    choices = json.loads(line[6:])["choices"]
    return bool(choices and choices[0]["delta"].get("content"))
