"""Prompts of the demo model's corpus and greedy answers to them, for tests that hold whole clusters to each other."""

import asyncio
import random
import sys
import urllib.request
from pathlib import Path

import numpy as np
import tritonclient.http.aio as triton

from kvstore.text import Tokenizer

MODEL = Path(__file__).parents[1] / "model_repository" / "demo"
PATIENCE_S = 240.0
"""For one answer, behind all others on a machine that is busy with something else."""


def conversations(count: int, longest: int, seed: int) -> list[list[int]]:
    """So many of 1 to `longest` tokens, half of them behind one of five beginnings."""
    sys.path.insert(0, str(MODEL / "train"))
    from corpus import render, sample

    tokenizer = Tokenizer.from_files({"tokenizer.json": (MODEL / "1" / "model" / "tokenizer.json").read_bytes()})
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        made: list[int] = []
        while len(made) < count:
            made += np.frombuffer(tokenizer.encode(render(sample(rng))), "<u4").tolist()
        return made[:count]

    beginnings = [tokens(rng.randint(100, 1200)) for _ in range(5)]
    made = [tokens(1), tokens(longest)]
    while len(made) < count:
        shared = rng.choice(beginnings) if rng.random() < 0.5 else []
        made.append(shared + tokens(rng.randint(1, longest - len(shared))))
    return made


async def answers(base: str, prompts: list[list[int]], *, tokens: int, at_once: int) -> list[list[int]]:
    """Greedy ones of a router, of so many tokens, so many requests at once."""
    turn = asyncio.Semaphore(at_once)
    address = base.removeprefix("http://")
    async with triton.InferenceServerClient(address, conn_limit=at_once, conn_timeout=PATIENCE_S) as client:

        async def ask(prompt: list[int]) -> list[int]:
            ids = triton.InferInput("input_ids", [len(prompt)], "INT32")
            ids.set_data_from_numpy(np.array(prompt, np.int32))
            options = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
            async with turn:
                got = await client.infer("demo", [ids], parameters=options)
            return got.as_numpy("output_ids").reshape(-1).tolist()

        return await asyncio.gather(*map(ask, prompts))


def remote_prefills(base: str) -> float:
    """How many prompts a router has had computed apart from their answers."""
    with urllib.request.urlopen(f"{base}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if "_prefills_total{" in line and 'where="remote"' in line)
