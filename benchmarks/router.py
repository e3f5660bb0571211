"""What a request and a token cost the router, beside Dynamo's frontend on the same machine, in turns in one run.

Each system serves the demo model's tokeniser and chat template by four mock instances that compute nothing. wrk sends
chats of some 860 characters on 32 connections, first for one token whole, then for 64 tokens streamed; then requests
come at a fixed rate, and the time to their first token is taken. CPU time is that of the router's (the frontend's)
process alone; a further token's is the difference of both loads over the 63 tokens between them.

Before each round a streamed answer is checked against the same answer whole. --soak sends so many requests more
and tells how much the router's memory has grown by them.
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from _rate import ttft_at_rate
from _systems import INSTANCES, Dynamo, Ours, System

ROOT = Path(__file__).resolve().parents[1]
PEER = ROOT / ".venv-dynamo" / "bin" / "python"
SCRIPT = Path(__file__).with_name("_wrk.lua")
CONNECTIONS = 32
STREAMED = 64
HIGHER_IS_BETTER = ("requests_per_s", "streams_per_s", "tokens_per_s")

Figures = dict[str, float]


def measure(system: System, args: argparse.Namespace, salt: "Iterator[int]") -> Figures:
    """One round. The system is up and has answered."""
    idle_mb = system.rss_mb()
    text = check(system)
    wrk(system, 1, next(salt), args.warm_up_s)
    whole = wrk(system, 1, next(salt), args.seconds)
    wrk(system, STREAMED, next(salt), args.warm_up_s)
    streamed = wrk(system, STREAMED, next(salt), args.seconds)
    first = asyncio.run(ttft_at_rate(system.base, args.rate, args.seconds, STREAMED, next(salt)))
    figures = {
        "requests_per_s": whole["rate"],
        "request_p50_ms": whole["p50_ms"],
        "request_p99_ms": whole["p99_ms"],
        "streams_per_s": streamed["rate"],
        "tokens_per_s": streamed["rate"] * STREAMED,
        "ttft_p50_ms": first[0],
        "ttft_p99_ms": first[1],
        "cpu_us_per_request": whole["cpu_us"],
        "cpu_us_per_further_token": (streamed["cpu_us"] - whole["cpu_us"]) / (STREAMED - 1),
        "rss_idle_mb": idle_mb,
        "rss_mb": system.rss_mb(),
        **text,
    }
    if args.soak:
        figures["rss_after_soak_mb"] = soak(system, args.soak, salt)
    return figures


def wrk(system: System, tokens: int, salt: int, seconds: float) -> Figures:
    variables = {"TOKENS": str(tokens), "STREAM": "true" if tokens > 1 else "false", "SALT": str(salt)}
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds:g}s", "--timeout", "30s", "-s", str(SCRIPT)]
    before_s = system.cpu_s()
    done = subprocess.run(
        [*command, f"{system.base}/v1/chat/completions"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **variables},
    )
    cpu_s = system.cpu_s() - before_s
    told = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    if told["failed"]:
        raise SystemExit(f"{system.name}: {told['failed']} of {told['requests']} requests failed")
    return {
        "rate": told["requests"] / told["seconds"],
        "cpu_us": 1e6 * cpu_s / told["requests"],
        "p50_ms": told["p50_ms"],
        "p99_ms": told["p99_ms"],
        "requests": told["requests"],
    }


def soak(system: System, requests: int, salt: "Iterator[int]") -> float:
    """MB of resident memory after so many requests more."""
    sent = 0.0
    while sent < requests:
        sent += wrk(system, 1, next(salt), 10.0)["requests"]
    return system.rss_mb()


def check(system: System) -> Figures:
    """That a streamed answer is the whole one's text, and has all its tokens. Raises `SystemExit`."""
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_tokens": STREAMED,
        "ignore_eos": True,
    }
    whole = json.loads(_post(system, body))
    stream = _post(system, {**body, "stream": True, "stream_options": {"include_usage": True}}).decode()
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    pieces = [c["delta"].get("content") or "" for event in events for c in event["choices"]]
    usage = next(event["usage"] for event in reversed(events) if event.get("usage"))
    if usage["completion_tokens"] != STREAMED or whole["usage"]["completion_tokens"] != STREAMED:
        raise SystemExit(f"{system.name} counts {usage['completion_tokens']} of {STREAMED} tokens")
    text = "".join(pieces)
    if system.name == Ours.name and text != whole["choices"][0]["message"]["content"]:
        raise SystemExit(f"{system.name} streams another text than it gives whole")
    return {"events_with_text": float(sum(map(bool, pieces))), "characters_of_64_tokens": float(len(text))}


def _post(system: System, body: dict[str, Any]) -> bytes:
    data, headers = json.dumps(body).encode(), {"content-type": "application/json"}
    request = urllib.request.Request(f"{system.base}/v1/chat/completions", data, headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        return bytes(response.read())


def report(rounds: dict[str, list[Figures]], args: argparse.Namespace) -> dict[str, Any]:
    """The JSON document: medians of the rounds, and ratios by which we are better (above 1) or worse."""
    medians = {
        name: {figure: round(statistics.median(r[figure] for r in of), 2) for figure in of[0]}
        for name, of in rounds.items()
    }
    document: dict[str, Any] = {
        "machine": {"cores": len(os.sched_getaffinity(0))},
        "workload": {
            "instances": INSTANCES,
            "connections": CONNECTIONS,
            **{k: getattr(args, k) for k in ("seconds", "rounds", "rate", "soak")},
        },
        "figures": medians,
        "rounds": rounds,
    }
    if Dynamo.name in medians:
        ours, peer = medians[Ours.name], medians[Dynamo.name]
        document["better_by"] = {
            figure: round(ours[figure] / peer[figure] if figure in HIGHER_IS_BETTER else peer[figure] / ours[figure], 2)
            for figure in ours
            if ours[figure] and peer[figure] and not figure.startswith(("events", "characters"))
        }
    return document


def table(document: dict[str, Any]) -> str:
    """For people."""
    figures = document["figures"]
    lines = [f"{'':>26}" + "".join(f"{name:>14}" for name in figures) + f"{'better by':>12}"]
    for figure in figures[Ours.name]:
        values = "".join(f"{figures[name][figure]:>14,.1f}" for name in figures)
        lines.append(f"{figure:>26}{values}{document.get('better_by', {}).get(figure, ''):>12}")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The load generator: apt-get install wrk. The peer's environment: `make dynamo-env`.",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    parser.add_argument("--peer", choices=["dynamo"], help="measure it too, in turns")
    parser.add_argument("--peer-python", type=Path, default=PEER, metavar="PATH", help="of its environment")
    parser.add_argument("--rounds", type=int, default=3, help="of each system (default: 3)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each load (default: 8)")
    parser.add_argument("--warm-up-s", type=float, default=2.0, help="before it (default: 2)")
    parser.add_argument("--rate", type=float, default=200.0, help="streams/s while TTFT is taken (default: 200)")
    parser.add_argument("--soak", type=int, default=0, metavar="N", help="so many requests more in the end of a round")
    args = parser.parse_args()
    if shutil.which("wrk") is None:
        parser.error("wrk is missing: apt-get install wrk")
    if args.peer and not args.peer_python.exists():
        parser.error(f"{args.peer_python} does not exist: `make dynamo-env` builds it")
    return args


def main() -> int:
    args = arguments()
    salt = iter(range(1, 10**6))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder)
        makers: list[Callable[[], System]] = [lambda: Ours(log / "ours.log")]
        if args.peer:
            makers.append(lambda: Dynamo(log / "dynamo.log", args.peer_python))
        rounds: dict[str, list[Figures]] = {}
        for turn in range(args.rounds):
            for make in makers if turn % 2 else makers[::-1]:
                with make() as system:
                    print(f"round {turn + 1} of {args.rounds}: {system.name}", file=sys.stderr, flush=True)
                    rounds.setdefault(system.name, []).append(measure(system, args, salt))
    document = report(rounds, args)
    print(json.dumps(document, indent=2) if args.json else table(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
