"""Disaggregated clusters beside as many aggregated workers, in simulated time: ITL, TTFT and throughput.

Mock engines (docs/engine-mock.md) on one simulated clock, led by the policies of the real router: placement, the
decision where a prompt is computed, and the prefill queue. The figures are of the mock's model of time, not of any
machine; equal arguments give equal figures. At each fixed rate all clusters get the same requests.

For each cluster it then looks for the highest rate that still meets the limits (p99 of every gap between two tokens of
a request, and p99 of the time to the first token). docs/disaggregation.md explains the model and shows a result.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import _packages  # noqa: F401 - first
import msgspec
from _simulator.cluster import EngineOptions, make_workers
from _simulator.figures import Limits, summary
from _simulator.routing import Link, RoutingOptions, simulate
from _simulator.workload import Mix, at_rate, mixed, traced
from msgspec import Struct
from msgspec.structs import asdict, replace

from dynamo_llm.engines.mock_engine.trace import TraceRequest
from router.config import DisaggSettings

POLICIES = ("auto", "always", "never")
RATE_STEP = 1.05
"""Between two rates that are tried for the limits."""
LOWEST_RATE = 0.5
RATES = 140


class Shape(Struct, frozen=True):
    """A disaggregated cluster's workers."""

    prefill: int
    decode: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        found = re.fullmatch(r"([1-9]\d*)P([1-9]\d*)D", text)
        if found is None:
            raise argparse.ArgumentTypeError(f"{text!r} is not like 2P6D")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.prefill}P{self.decode}D"


SHAPES = [Shape(2, 6), Shape(3, 5), Shape(4, 4), Shape(5, 3)]


class Setup(Struct, frozen=True, kw_only=True):
    """One cluster."""

    name: str
    shape: tuple[tuple[str, int], ...]
    """Roles, and how many workers have each."""
    engine: EngineOptions
    routing: RoutingOptions

    @property
    def workers(self) -> int:
        return sum(count for _, count in self.shape)


class Bench:
    """Simulates each setup at each rate once."""

    def __init__(self, requests: list[TraceRequest], seed: int) -> None:
        self._requests, self._seed = requests, seed
        self._done: dict[tuple[str, float], dict[str, Any]] = {}

    def figures(self, setup: Setup, rate: float) -> dict[str, Any]:
        key = setup.name, rate
        if key not in self._done:
            workers = make_workers(setup.shape, setup.engine)
            router = simulate(workers, at_rate(self._requests, rate), setup.routing, seed=self._seed)
            self._done[key] = summary(router.journal, len(workers))
        return self._done[key]

    def highest_rate(self, setup: Setup, limits: Limits) -> float:
        """Of a ladder of rates, the highest that meets the limits, as if all below it did; 0: none does."""
        low, high = -1, RATES
        while high - low > 1:
            middle = (low + high) // 2
            if limits.hold(self.figures(setup, _rung(middle))):
                low = middle
            else:
                high = middle
        return _rung(low) if low >= 0 else 0.0


def _rung(number: int) -> float:
    return float(f"{LOWEST_RATE * RATE_STEP**number:.3g}")


def setups(args: argparse.Namespace) -> list[Setup]:
    engine, routing = EngineOptions(), options(args)
    made = [
        Setup(
            name=f"{args.workers} agg, {tokens} a step",
            shape=(("agg", args.workers),),
            engine=replace(engine, max_batch_tokens=tokens),
            routing=routing,
        )
        for tokens in args.agg_batch_tokens
    ]
    for shape in args.shapes:
        for policy in args.policies:
            disagg = replace(routing.disagg, remote_prefill=policy)
            made.append(
                Setup(
                    name=f"{shape} {policy}",
                    shape=(("prefill", shape.prefill), ("decode", shape.decode)),
                    engine=engine,
                    routing=replace(routing, disagg=disagg),
                )
            )
    return made


def options(args: argparse.Namespace) -> RoutingOptions:
    link = Link(kv_bytes_per_token=args.kv_bytes_per_token, gb_per_s=args.link_gb_per_s, overhead_ms=args.handover_ms)
    pairs = [setting.partition("=") for setting in args.set or []]
    if any(not equals for _, equals, _ in pairs):
        raise ValueError("--set wants NAME=VALUE")
    settings = {name: value for name, _, value in pairs}
    disagg = msgspec.convert(settings, DisaggSettings, strict=False)
    return RoutingOptions(link=link, disagg=disagg, first_token_counts=not args.drop_first_token)


def measure(args: argparse.Namespace, requests: list[TraceRequest]) -> list[dict[str, Any]]:
    bench, results = Bench(requests, args.seed), []
    limits = Limits(itl_p99_ms=args.itl_ms, ttft_p99_ms=args.ttft_ms)
    made = setups(args)
    for number, setup in enumerate(made, 1):
        print(f"{number} of {len(made)}: {setup.name}", file=sys.stderr, flush=True)
        at = {f"{rate:g}": bench.figures(setup, rate) for rate in args.rates}
        within = bench.highest_rate(setup, limits)
        results.append(
            {
                "cluster": setup.name,
                "at_rate": at,
                "highest_rate_within_limits": within,
                "figures_there": bench.figures(setup, within) if within else None,
            }
        )
    return results


def document(args: argparse.Namespace, requests: list[TraceRequest]) -> dict[str, Any]:
    results = measure(args, requests)
    rates = {result["cluster"]: result["highest_rate_within_limits"] for result in results}
    peer = max((rate for name, rate in rates.items() if " agg" in name), default=0.0)
    routing = options(args)
    return {
        "workload": {
            "trace": args.trace.name if args.trace else None,
            "mix": None if args.trace else asdict(Mix(documents=args.documents)),
            "requests": len(requests),
            "seed": args.seed,
            "mean_prompt_tokens": round(sum(r.input_length for r in requests) / len(requests)),
            "mean_output_tokens": round(sum(r.output_length for r in requests) / len(requests)),
        },
        "assumptions": {
            "workers": args.workers,
            "engine": msgspec.to_builtins(EngineOptions()),
            "link": {**asdict(routing.link), "tokens_per_s": round(routing.link.tokens_per_s)},
            "queue": asdict(routing.queue),
            "settings": msgspec.to_builtins(routing.disagg),
            "placement": msgspec.to_builtins(routing.placement),
            "first_token_counts": routing.first_token_counts,
        },
        "limits": {"itl_p99_ms": args.itl_ms, "ttft_p99_ms": args.ttft_ms},
        "results": results,
        "ratio_to_best_agg": {name: round(rate / peer, 2) for name, rate in rates.items()} if peer else None,
    }


def table(result: dict[str, Any]) -> str:
    """For people."""
    limits = result["limits"]
    lines = []
    for rate in result["results"][0]["at_rate"]:
        lines.append(f"{rate} requests/s: milliseconds; tokens/s a worker; share of prompts computed remotely")
        lines.append(f"  {'':24}{'ITL p50':>9}{'p99':>9}{'TTFT p50':>10}{'p99':>9}{'tokens/s':>10}{'remote':>8}")
        lines += [f"  {entry['cluster']:24}{_row(entry['at_rate'][rate])}" for entry in result["results"]]
    lines.append(
        f"Highest rate with ITL p99 <= {limits['itl_p99_ms']:g} ms and TTFT p99 <= {limits['ttft_p99_ms']:g} ms"
    )
    ratios = result["ratio_to_best_agg"]
    for entry in result["results"]:
        ratio = f"{ratios[entry['cluster']]:>8.2f} of the best aggregated" if ratios else ""
        lines.append(f"  {entry['cluster']:24}{entry['highest_rate_within_limits']:>9.3g} requests/s{ratio}")
    return "\n".join(lines)


def _row(figures: dict[str, Any]) -> str:
    remote = sum(share for reason, share in figures["prefills"].items() if reason.startswith("remote"))
    return (
        f"{figures['itl_p50_ms']:>9.1f}{figures['itl_p99_ms']:>9.1f}{figures['ttft_p50_ms']:>10.0f}"
        f"{figures['ttft_p99_ms']:>9.0f}{figures['tokens_per_s_per_worker']:>10.0f}{remote:>8.0%}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = {"type": int, "metavar": "N"}
    ms = {"type": float, "metavar": "MS"}

    def add(flag: str, text: str, **options: Any) -> None:
        default = options.get("default")
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else default
        parser.add_argument(flag, help=text if shown is None else f"{text} (default: {shown})", **options)

    link = Link()
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of tables")
    add("--workers", "aggregated workers", default=8, **number)
    add("--shapes", "disaggregated clusters", type=Shape.parse, nargs="*", metavar="xPyD", default=SHAPES)
    add("--policies", "values of remote_prefill", nargs="*", choices=POLICIES, default=POLICIES)
    add(
        "--agg-batch-tokens",
        "most tokens a step of aggregated workers",
        nargs="*",
        default=[512, 1024, 2048, 8192],
        **number,
    )
    add("--rates", "requests/s", type=float, nargs="*", metavar="R", default=[20.0, 40.0])
    add("--itl-ms", "limit of the p99 of ITL", default=50.0, **ms)
    add("--ttft-ms", "limit of the p99 of TTFT", default=2000.0, **ms)
    add("--requests", "how many; 1500 of the mix, all of a trace where this is left out", **number)
    add("--documents", "share of long prompts in the mix", type=float, metavar="SHARE", default=Mix().documents)
    add("--trace", "of requests in the Mooncake format, stretched to the rates, instead of the mix", type=Path)
    add("--seed", "of the mix and of the router's choice among equals", default=0, **number)
    add("--kv-bytes-per-token", "of the model; Llama 3.1 8B in BF16", default=link.kv_bytes_per_token, **number)
    add("--link-gb-per-s", "of each worker; a NIC of 200 Gbit/s", type=float, metavar="G", default=link.gb_per_s)
    add("--handover-ms", "from a prefill's end to its decode worker", default=link.overhead_ms, **ms)
    add("--drop-first-token", "the decode worker generates it anew, as with vLLM", action="store_true")
    add("--set", "a setting of docs/disaggregation.md; again for more", action="append", metavar="NAME=VALUE")
    return parser.parse_args()


def validate(args: argparse.Namespace) -> None:
    """Raises `ValueError`."""
    counts = (args.workers, *args.rates, *args.agg_batch_tokens, args.kv_bytes_per_token, args.link_gb_per_s)
    if min(counts) <= 0:
        raise ValueError("workers, rates, tokens, bytes and GB/s are to be above 0")
    if min(args.agg_batch_tokens, default=512) < EngineOptions().max_seqs:
        raise ValueError(f"--agg-batch-tokens is at least {EngineOptions().max_seqs}: so many sequences may decode")
    if args.requests is not None and args.requests < 2:
        raise ValueError("at least 2 requests are needed")
    if not 0 <= args.documents <= 1:
        raise ValueError("--documents is a share, from 0 to 1")


def main() -> int:
    args = arguments()
    try:
        validate(args)
        if args.trace:
            requests = traced(args.trace, args.requests)
        else:
            requests = mixed(Mix(documents=args.documents), args.requests or 1500, args.seed)
        result = document(args, requests)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    print(json.dumps(result, indent=2) if args.json else table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
