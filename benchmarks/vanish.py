"""How long KV blocks stay taken after streaming clients vanish in the middle of their answers.

Starts a cluster (two workers, torch engine, demo model), lets N clients stream endless answers, closes all their
connections at once, and measures until no worker reports a running or waiting sequence or a block in use. Repeats, and
reports what router and workers hold after each round: open files, threads and resident memory. Allocators warm up
in the first rounds; what grows from the middle round to the last is growth.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from _cluster import cluster, status

GROWTH_MB = 4.0
"""Resident memory that is noise: garbage that has not been collected yet, and the pages that it left behind."""
BODY = {
    "model": "demo",
    "messages": [{"role": "user", "content": "Tell me a story about a fox."}],
    "stream": True,
    "ignore_eos": True,
    "max_tokens": 1900,
}


async def open_stream(base: str) -> asyncio.StreamWriter:
    """A client that has read three events of its answer."""
    host, port = base.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps(BODY).encode()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    seen = b""
    while seen.count(b"data:") < 3:
        piece = await reader.read(65536)
        if not piece:
            raise SystemExit(f"a client was refused: {seen[:200]!r}")
        seen += piece
    return writer


def blocks_in_use(document: dict[str, Any]) -> int:
    return sum(i["kv_blocks_used"] + i["inflight"] + i["load"]["running"] for i in document["instances"])


async def vanish(base: str, clients: int) -> dict[str, float]:
    """Milliseconds from the closing of the last connection until everything is free."""
    writers = await asyncio.gather(*(open_stream(base) for _ in range(clients)))
    while (used := blocks_in_use(await asyncio.to_thread(status, base))) < clients:  # noqa: ASYNC110 - it happens in other processes
        await asyncio.sleep(0.01)
    start_s = time.perf_counter()
    for writer in writers:
        writer.transport.abort()
    while blocks_in_use(await asyncio.to_thread(status, base)):
        if time.perf_counter() - start_s > 30:
            raise SystemExit("blocks are still in use after 30 s")
        await asyncio.sleep(0.005)
    return {"blocks_and_requests_before": used, "free_after_ms": round(1e3 * (time.perf_counter() - start_s), 1)}


def held(pid: int) -> dict[str, float]:
    """What a process holds."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return {
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
        "rss_mb": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1),
    }


def growth(holdings: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """By process: what it holds more after the last round than after the middle one."""
    middle, last = holdings[len(holdings) // 2], holdings[-1]
    return {name: {what: round(last[name][what] - middle[name][what], 1) for what in last[name]} for name in last}


def grew(difference: dict[str, float]) -> bool:
    return difference["files"] > 0 or difference["threads"] > 0 or difference["rss_mb"] > GROWTH_MB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=200, help="clients that vanish at once (default 200)")
    parser.add_argument("--rounds", type=int, default=24, help="how often (default 24)")
    parser.add_argument("--limit-ms", type=float, default=1000, help="exit with 1 above it (default 1000)")
    parser.add_argument("--json", action="store_true", help="say nothing but the JSON")
    args = parser.parse_args()
    rounds, holdings = [], []
    with cluster("--workers", "2", "--engine-option", "kv_blocks=4096") as base:
        document = status(base)
        pids = {"router": document["pid"]}
        pids |= {f"worker-{number}": i["pid"] for number, i in enumerate(document["instances"], 1)}
        for number in range(args.rounds):
            if not args.json:
                print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
            rounds.append(asyncio.run(vanish(base, args.clients)))
            holdings.append({name: held(pid) for name, pid in pids.items()})
    times_ms = sorted(r["free_after_ms"] for r in rounds)
    figures = {
        "clients": args.clients,
        "median_ms": times_ms[len(times_ms) // 2],
        "slowest_ms": times_ms[-1],
        "growth_from_the_middle_round": growth(holdings),
        "rounds": rounds,
        "held_after_each_round": holdings,
    }
    print(json.dumps(figures, indent=2))
    sys.exit(times_ms[-1] > args.limit_ms or any(map(grew, growth(holdings).values())))


if __name__ == "__main__":
    main()
