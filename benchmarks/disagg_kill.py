"""What `kill -9` of prefill and decode workers costs the requests that run on them: nothing, it should be.

Starts a disaggregated cluster (two prefill and two decode workers, torch engine, demo model, NIXL over TCP as between
machines) and keeps clients streaming from it, all prompts prefilled remotely. Then it kills one worker after the other
with -9, of both roles in turns: at any time, with pulls held up until it is dead, or behind them; the process with the
engine, its Triton server, or both. Each comes back and is killed again after it took requests. After each kill the
clients pause until nobody holds a block. In the end all workers of a role are killed at once.

Every answer is compared with the known one. Exit code 1 if one was wrong, or failed though a decode worker was there to
compute it, or if a block was held by then for longer than its lease.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from _cluster import cluster
from _fleet import Fleet, Worker, hanging_pulls, until
from _streams import Answer, Client, Load, make_prompts

from kvstore.connect import connect
from kvstore.embedded import EmbeddedRedis
from kvstore.keys import Keys
from kvstore.registry import Registry

LEASE_S = 10.0
SLACK_S = 5.0
SETTLE_S = 1.0
"""Load after a death, beside what was under way."""
NEWCOMERS = 2
"""Clients that come when all workers of a role are dead."""
ROLES = ("prefill", "decode")
OTHER = {"prefill": "decode", "decode": "prefill"}
MOMENTS = ("pull", "later", "any")
WHAT = ("node", "process", "server")
SETTINGS = {"remote_prefill": "always", "max_local_prefill_tokens": 0}


@dataclass
class Strike:
    """One kill, and what it struck."""

    role: str
    moment: str
    """`any`; `pull`: pulls from it, or its own, were held up until it was dead; `later`: when streams went on behind a
    first token that was, or came from, its own; `all`: with all of its role."""
    what: str
    """`process` with the engine, Triton `server`, or both: `node`."""
    requests: int = 0
    unheard: int = 0
    """Requests without a token when it died, wherever they were."""
    handed_over: int = 0
    """Those of the dead worker that had their first token and no other."""
    decoding: int = 0
    """Those of the dead worker that had more."""
    pulls: int = 0
    """That were under way: from the dead worker, or its own."""
    longest_gap_s: float = 0.0
    """Between two tokens of any request."""
    quiet_after_s: float = 0.0
    made_good: dict[str, int] = field(default_factory=dict)
    leaked: dict[str, int] = field(default_factory=dict)


@dataclass
class Totals:
    requests: int = 0
    failed: int = 0
    wrong: int = 0
    refused: int = 0
    """Told at once that there is no decode worker, while there was none."""
    given_up: int = 0
    """Had begun, and were told so after no decode worker had come up in the router's time for it."""
    reasons: dict[str, int] = field(default_factory=dict)


class Killer:
    """Kills, watches, counts."""

    def __init__(self, fleet: Fleet, client: Client, clients: int, say: Any) -> None:
        self._fleet, self._client, self._clients, self._say = fleet, client, clients, say
        self.strikes: list[Strike] = []
        self.totals = {"one at a time": Totals(), "all prefill workers": Totals(), "all decode workers": Totals()}
        self._next: dict[str, str] = {}

    async def kill_one(self, role: str, moment: str, what: str) -> None:
        """The worker of that role that has lived longest."""
        workers = await self._fleet.until_ready(role, 2)
        victim = next((w for w in workers if w.instance == self._next.get(role)), workers[0])
        self._next[role] = next(w.instance for w in workers if w is not victim)
        strike, answers = Strike(role, moment, what), list[Answer]()
        before = await self._counts()
        async with Load(self._client, self._clients, answers, seed=len(self.strikes)):
            await self._until_used(victim, answers, later=moment == "later")
            strike.pulls = await self._strike(victim, moment, what)
            struck = [answer for answer in answers if not answer.ended.is_set()]
            self._note_stages(strike, victim, struck)
            await asyncio.sleep(SETTLE_S)
            await asyncio.gather(*(answer.ended.wait() for answer in struck))
        await self._settle(strike, answers, before, "one at a time")

    async def kill_all(self, role: str) -> None:
        """All workers of a role. Clients go on until they are back."""
        strike, answers = Strike(role, "all", "node"), list[Answer]()
        workers = await self._fleet.until_ready(role, 2)
        before = await self._counts()
        async with Load(self._client, self._clients, answers, seed=len(self.strikes)):
            await self._until_used(workers[0], answers)
            for worker in workers:
                worker.kill("node")
            self._note_stages(strike, workers[0], [answer for answer in answers if not answer.ended.is_set()])
            await until(lambda: self._are_gone(workers), 60.0, "the dead ones are not listed")
            async with Load(self._client, NEWCOMERS, answers, seed=-1):
                await self._fleet.until_ready(role, 2)
                await asyncio.sleep(SETTLE_S)
        await self._settle(strike, answers, before, f"all {role} workers")

    async def _strike(self, victim: Worker, moment: str, what: str) -> int:
        """Kill it; returns the pulls that were under way."""
        others = await self._fleet.workers(OTHER[victim.role])
        if moment != "pull":
            victim.kill(what)
            return 0
        writers, readers = ([victim], others) if victim.role == "prefill" else (others, [victim])
        async with hanging_pulls(writers, readers) as pulls:
            victim.kill(what)
        return pulls

    async def _settle(self, strike: Strike, answers: list[Answer], before: Counter[str], phase: str) -> None:
        """All have ended: judge the answers, and wait for the blocks."""
        strike.quiet_after_s, leaked = await self._fleet.until_quiet(LEASE_S + SLACK_S)
        strike.leaked = dict(leaked)
        for name, count in (await self._counts() - before).items():
            what = name.rpartition("|")[2]
            strike.made_good[what] = strike.made_good.get(what, 0) + count
        strike.requests = len(answers)
        strike.longest_gap_s = max(answer.longest_gap_s for answer in answers)
        self.strikes.append(strike)
        for answer in answers:
            self._judge(answer, self.totals[phase], no_decode=phase == "all decode workers")
        self._say(f"{len(self.strikes)}: {json.dumps(_rounded(strike))}")

    def _judge(self, answer: Answer, totals: Totals, no_decode: bool) -> None:
        totals.requests += 1
        if not answer.error:
            totals.wrong += answer.text != self._client.known[answer.prompt]
            return
        if no_decode and answer.status == 503:
            totals.refused += 1
        elif no_decode and answer.error.startswith(("unavailable", "worker_failed")):
            totals.given_up += 1
        else:
            totals.failed += 1
        totals.reasons[answer.error] = totals.reasons.get(answer.error, 0) + 1

    def _note_stages(self, strike: Strike, victim: Worker, struck: list[Answer]) -> None:
        strike.unheard = sum(not answer.status for answer in struck)
        mine = [a for a in struck if victim.instance in (a.instance, a.prefill_instance)]
        strike.handed_over = sum(a.events == 1 for a in mine)
        strike.decoding = sum(a.events > 1 for a in mine)

    async def _until_used(self, victim: Worker, answers: list[Answer], later: bool = False) -> None:
        """It has been given work, and clients have had answers. `later`: some of its requests stream."""

        async def used() -> bool:
            if sum(answer.ended.is_set() for answer in answers) < self._clients:
                return False
            if later:
                mine = [a for a in answers if victim.instance in (a.instance, a.prefill_instance)]
                return sum(a.events > 2 and not a.ended.is_set() for a in mine) > 1
            workers = await self._fleet.workers(victim.role)
            return any(w.instance == victim.instance and w.inflight for w in workers)

        await until(used, 60.0, "the worker gets work")

    async def _are_gone(self, dead: list[Worker]) -> bool:
        ready = {worker.instance for worker in await self._fleet.workers()}
        return not ready & {worker.instance for worker in dead}

    async def _counts(self) -> Counter[str]:
        """The router's, and of the workers that live those of pulls and pins."""
        counts = await self._fleet.counted()
        for instance, pulls in (await self._fleet.pulls()).items():
            counts.update({f"{instance}|pull {reason}": n for reason, n in pulls.items()})
        return counts


def _rounded(strike: Strike) -> dict[str, Any]:
    return {name: round(value, 2) if isinstance(value, float) else value for name, value in asdict(strike).items()}


async def run(base: str, redis_url: str, args: argparse.Namespace, say: Any) -> Killer:
    async with connect(redis_url) as redis:
        registry = Registry(redis, Keys(namespace="default"))
        fleet, client = Fleet(base, registry), Client(base, make_prompts(40, 1900), args.max_tokens)
        await registry.set_setting("remote_prefill", "never")
        await client.learn(args.clients)
        for name, value in SETTINGS.items():
            await registry.set_setting(name, value)
        killer = Killer(fleet, client, args.clients, say)
        for number in range(args.kills):
            for role in ROLES:
                await killer.kill_one(role, MOMENTS[number % 3], WHAT[(number + number // 3) % 3])
        if not args.keep_one:
            for role in ROLES:
                await killer.kill_all(role)
        return killer


def report(killer: Killer) -> dict[str, Any]:
    """What is printed."""
    strikes, made_good = killer.strikes, Counter[str]()
    for strike in strikes:
        made_good.update(strike.made_good)
    single = [strike for strike in strikes if strike.moment != "all"]
    return {
        "kills": {role: sum(strike.role == role for strike in single) for role in ROLES},
        "phases": {name: asdict(totals) for name, totals in killer.totals.items() if totals.requests},
        "struck": {
            role: {
                stage: sum(getattr(strike, stage) for strike in single if strike.role == role)
                for stage in ("unheard", "handed_over", "decoding", "pulls")
            }
            for role in ROLES
        },
        "counted": dict(sorted(made_good.items())),
        "leaked": sum(sum(strike.leaked.values()) for strike in strikes),
        "slowest_quiet_s": round(max(strike.quiet_after_s for strike in strikes), 2),
        "longest_gap_s": round(max(strike.longest_gap_s for strike in single), 2),
        "strikes": [_rounded(strike) for strike in strikes],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each role (default 20)")
    parser.add_argument("--clients", type=int, default=12, help="at once (default 12)")
    parser.add_argument("--max-tokens", type=int, default=128, help="of an answer (default 128)")
    parser.add_argument("--keep-one", action="store_true", help="never kill all workers of a role")
    parser.add_argument("--json", action="store_true", help="say nothing but the JSON")
    args = parser.parse_args()
    os.environ.setdefault("UCX_TLS", "tcp")
    os.environ.setdefault("UCX_NET_DEVICES", "lo")

    def say(text: str) -> None:
        if not args.json:
            print(text, file=sys.stderr, flush=True)

    options = ["--engine-option", f"kv_lease_s={LEASE_S}", "--engine-option", "kv_blocks=2048"]
    with EmbeddedRedis() as redis:
        command = ["--redis", redis.url, "--mode", "disagg-router", "--prefill", "2", "--decode", "2", *options]
        with cluster(*command) as base:
            began_s = time.monotonic()
            killer = asyncio.run(run(base, redis.url, args, say))
    figures = {"seconds": round(time.monotonic() - began_s), **report(killer)}
    print(json.dumps(figures, indent=2))
    lost = sum(totals.failed + totals.wrong for totals in killer.totals.values())
    sys.exit(bool(lost or figures["leaked"]))


if __name__ == "__main__":
    main()
