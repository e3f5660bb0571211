"""What disaggregation adds to the time to the first two tokens, and in which stage. For transfer.py.

One prefill and one decode worker beside one aggregated worker (torch engine, demo model), each behind a router of its
own. Requests go to the one and to the other cluster in turns, one at a time, each with a prompt that no cache holds.
The first token of the torch engine is the prefill worker's own, so the blocks travel between the first and the second
token; engines whose decode worker makes the first token anew (vLLM) have the second one's delay before their first.
"""

import asyncio
import json
import statistics
import time
from collections import defaultdict
from typing import Any

from _cluster import cluster
from _fleet import read_figures, total
from _streams import Answer, Client, make_prompts

from kvstore.connect import connect
from kvstore.embedded import EmbeddedRedis
from kvstore.keys import Keys
from kvstore.registry import Registry

SETTINGS = {"remote_prefill": "always", "max_local_prefill_tokens": 0}
STAGES = {"queue": "remote_prefill_queue", "prefill": "remote_prefill", "transfer": "kv_transfer"}
"""Histograms of the router; what `remote_prefill` tells begins with the queue."""
TOKENS = 8
"""Of an answer."""

Times = dict[str, list[float]]
"""Milliseconds by what they are of, one for each round."""


class _Client(Client):
    """Its prompts are in no cache."""

    def body(self, prompt: int) -> bytes:
        self._salts += 1
        options = {"temperature": 0, "ignore_eos": True, "max_tokens": TOKENS, "stream": True}
        salt = {"cache_salt": f"salt-{self._salts}"}
        return json.dumps({"model": "demo", "prompt": self.prompts[prompt], **options, **salt}).encode()


def measure(lengths: list[int], rounds: int) -> dict[str, Any]:
    """The document by prompt length; see `_report`."""
    with EmbeddedRedis() as redis:
        alike = ("--engine-option", "threads=1")  # else a worker that is alone takes more cores
        roles = ("--redis", redis.url, "--mode", "disagg", "--prefill", "1", "--decode", "1")
        with cluster("--mode", "agg", "--workers", "1", *alike) as aggregated, cluster(*roles, *alike) as disaggregated:
            return asyncio.run(_measure(aggregated, disaggregated, redis.url, lengths, rounds))


async def _measure(
    aggregated: str, disaggregated: str, redis_url: str, lengths: list[int], rounds: int
) -> dict[str, Any]:
    async with connect(redis_url) as redis:
        for name, value in SETTINGS.items():
            await Registry(redis, Keys(namespace="default")).set_setting(name, value)
    longest = make_prompts(2, max(lengths))[-1]
    prompts = [longest[:length] for length in lengths]
    times: dict[int, dict[str, Times]] = {n: {"agg": defaultdict(list), "disagg": defaultdict(list)} for n in lengths}
    ways = {"agg": aggregated, "disagg": disaggregated}
    clients = {way: _Client(base, prompts, TOKENS) for way, base in ways.items()}
    for turn in range(rounds + 2):
        for number, length in enumerate(lengths):
            for way in ("agg", "disagg") if turn % 2 else ("disagg", "agg"):
                taken = await _ask(clients[way], number, ways[way], remote=way == "disagg")
                if turn > 1:  # the first two turns warm up
                    for name, ms in taken.items():
                        times[length][way][name].append(ms)
    return {str(length): _report(times[length]["agg"], times[length]["disagg"]) for length in lengths}


async def _ask(client: Client, prompt: int, base: str, *, remote: bool) -> dict[str, float]:
    """Milliseconds of one request: until its first two tokens, and of its stages where it has some."""
    before, began_s = await _sums(base), time.monotonic()
    answer = await client.ask(Answer(prompt))
    after = await _sums(base)
    if answer.error or answer.events < 2 or remote != bool(answer.prefill_instance):
        raise SystemExit(f"a prompt of {len(client.prompts[prompt])} tokens went astray: {answer.error or answer}")
    first, second = (1e3 * (at_s - began_s) for at_s in answer.times_s[:2])
    taken = {"first": first, "second": second}
    if remote:
        queue, handed_over, transfer = (1e3 * (after[name] - before[name]) for name in STAGES)
        taken |= {"queue": queue, "prefill": handed_over - queue, "transfer": transfer}
        taken |= {"router": first - handed_over, "first_decode": second - first - transfer}
    return taken


async def _sums(base: str) -> dict[str, float]:
    """Seconds by stage, of all requests so far."""
    figures = await read_figures(f"{base}/metrics")
    return {stage: total(figures, f"dynamo_llm_router_{name}_seconds_sum") for stage, name in STAGES.items()}


def _report(aggregated: Times, disaggregated: Times) -> dict[str, Any]:
    """Medians in milliseconds. What is extra is the median of the rounds' differences: both had the same moment."""
    tokens, stages = ("first", "second"), ("router", "queue", "prefill", "transfer", "first_decode")
    extra = {name: [b - a for a, b in zip(aggregated[name], disaggregated[name], strict=True)] for name in tokens}
    return {
        "aggregated": {name: _median(aggregated[name]) for name in tokens},
        "disaggregated": {name: _median(disaggregated[name]) for name in tokens},
        "extra": {name: _median(extra[name]) for name in tokens},
        "stages": {name: _median(disaggregated[name]) for name in stages},
    }


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 2)
