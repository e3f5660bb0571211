"""What `make demo` runs: a small cluster on this machine, asked in four ways by clients that people already have.

Starts `dynamo-llm up` (embedded Redis, two workers with the torch engine and the demo model, one KV-aware router),
asks, prints for each question the answer, the worker that gave it, the prompt's KV blocks, how many of them were reused
and the time to the first token, and stops everything. Exits 0 only if every answer is the right one.
"""

import argparse
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import openai
import tritonclient.grpc as triton
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
MODEL = "demo"
SYSTEM = "You are a helpful assistant. Answer clearly and briefly. " * 40


class Answer:
    """One row of the table."""

    def __init__(
        self, what: str, text: str, expected: str, worker: str, blocks: int, reused: int, ttft_ms: float
    ) -> None:
        self.what, self.text, self.right = what, text.strip(), text.strip() == expected
        self.worker, self.blocks, self.reused, self.ttft_ms = worker, blocks, reused, ttft_ms


def chat(base: str, what: str, question: str, expected: str, system: str | None = None) -> Answer:
    """A chat completion streamed over OpenAI HTTP, by the `openai` package."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as client:
        start, first_s, text, cached = time.perf_counter(), None, "", 0
        raw = client.chat.completions.with_raw_response.create(
            model=MODEL, messages=messages, temperature=0, stream=True, stream_options={"include_usage": True}
        )
        for chunk in raw.parse():
            piece = chunk.choices[0].delta.content if chunk.choices else None
            if piece:
                first_s = first_s or time.perf_counter() - start
                text += piece
            if chunk.usage:
                cached = chunk.usage.prompt_tokens_details.cached_tokens
    headers, block_size = raw.headers, _block_size(base)
    return Answer(
        what,
        text,
        expected,
        headers["x-dynamo-instance"],
        int(headers["x-dynamo-prompt-blocks"]),
        cached // block_size,
        1e3 * (first_s or 0),
    )


def kserve_stream(base: str, grpc_address: str, question: str, expected: str) -> Answer:
    """A KServe v2 gRPC stream, by the `tritonclient` package."""
    inputs = []
    for name, value, dtype in [
        ("text_input", np.array([_prompt(question).encode()], np.object_), "BYTES"),
        ("stream", np.array([True]), "BOOL"),
        ("sampling_parameters", np.array([b'{"temperature": 0, "max_tokens": 64}'], np.object_), "BYTES"),
    ]:
        inputs.append(triton.InferInput(name, list(value.shape), dtype))
        inputs[-1].set_data_from_numpy(value)
    responses: queue.Queue = queue.Queue()
    start, first_s, text, parameters = time.perf_counter(), None, "", {}
    with triton.InferenceServerClient(grpc_address) as client:
        client.start_stream(lambda result, error: responses.put((result, error)))
        client.async_stream_infer(MODEL, inputs, enable_empty_final_response=True)
        while not parameters.get("triton_final_response"):
            result, error = responses.get(timeout=30)
            if error:
                raise error
            piece = result.as_numpy("text_output")
            if piece is not None and piece.size:
                first_s = first_s or time.perf_counter() - start
                text += piece.reshape(-1)[0].decode()
            parameters |= {k: _parameter(v) for k, v in result.get_response().parameters.items()}
        client.stop_stream()
    reused = int(parameters["cached_tokens"]) // _block_size(base)
    return Answer(
        "KServe v2 gRPC stream",
        text,
        expected,
        parameters["instance"],
        int(parameters["prompt_blocks"]),
        reused,
        1e3 * (first_s or 0),
    )


def generate(base: str, question: str, expected: str) -> Answer:
    """Triton's generate extension over HTTP, by the standard library (or curl)."""
    body = {"text_input": _prompt(question), "exclude_input_in_output": True, "temperature": 0, "max_tokens": 64}
    request = urllib.request.Request(
        f"{base}/v2/models/{MODEL}/generate", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        answer = json.load(response)
        headers = response.headers
    return Answer(
        "Triton generate over HTTP",
        answer["text_output"],
        expected,
        headers["x-dynamo-instance"],
        int(headers["x-dynamo-prompt-blocks"]),
        int(headers["x-dynamo-cached-tokens"]) // _block_size(base),
        float(headers["x-dynamo-ttft-ms"]),
    )


def ask_all(base: str, grpc_address: str) -> Iterator[Answer]:
    """The four ways in, one after the other."""
    yield chat(base, "OpenAI chat, streamed", "What is the capital of France?", "The capital of France is Paris.")
    yield chat(base, "long system prompt, first", "What is 12 + 30?", "12 + 30 = 42.", SYSTEM)
    yield chat(base, "long system prompt, again", "Spell the word lantern.", "l-a-n-t-e-r-n.", SYSTEM)
    yield kserve_stream(base, grpc_address, "Count from 3 to 9.", "3, 4, 5, 6, 7, 8, 9.")
    yield generate(base, "Name the capital of Japan.", "The capital of Japan is Tokyo.")


@contextmanager
def cluster(http_port: int, grpc_port: int, workers: int) -> Iterator[str]:
    """`dynamo-llm up` as a child; yields its base URL once a request can be served, and stops it at the end."""
    command = [sys.executable, "-m", "dynamo_llm", "up", "--mode", "agg-router", "--workers", str(workers)]
    command += ["--engine", "torch", "--model", str(ROOT / "model_repository" / MODEL)]
    command += ["--http-port", str(http_port), "--grpc-port", str(grpc_port)]
    # A session of its own: a Ctrl-C is for us, and we ask it to end in order.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        line = process.stdout.readline().split()
        if line[:1] != ["ready"]:
            raise SystemExit(f"the cluster did not start (exit code {process.wait()})")
        yield line[1]
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()  # its guard ends what it had started
            raise
    if code != 0:
        raise SystemExit(f"dynamo-llm up ended with exit code {code}")


def _prompt(question: str) -> str:
    return f"<|begin|><|user|>{question}<|end|><|assistant|>"


def _parameter(value) -> object:
    return getattr(value, value.WhichOneof("parameter_choice"))


def _block_size(base: str) -> int:
    with urllib.request.urlopen(f"{base}/status", timeout=10) as response:
        return json.load(response)["models"][0]["block_size"]


def _free_ports(count: int) -> list[int]:
    """Bound together, so that no two are the same."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2, help="workers to start (default 2)")
    parser.add_argument("--http-port", type=int, help="the router's HTTP port (default: a free one)")
    parser.add_argument("--grpc-port", type=int, help="the router's gRPC port (default: a free one)")
    args = parser.parse_args()
    free = _free_ports(2)
    http_port, grpc_port = args.http_port or free[0], args.grpc_port or free[1]

    console = Console()
    console.width = max(console.width, 120)
    start = time.perf_counter()
    with cluster(http_port, grpc_port, args.workers) as base:
        console.print(f"ready after {time.perf_counter() - start:.1f} s at {base}")
        answers = list(ask_all(base, f"127.0.0.1:{grpc_port}"))
    table = Table("asked by", "answer", "worker", "prompt blocks", "reused", "TTFT ms")
    for a in answers:
        answer = a.text if a.right else f"[red]{a.text} (wrong)[/red]"
        table.add_row(a.what, answer, a.worker, str(a.blocks), str(a.reused), f"{a.ttft_ms:.1f}")
    console.print(table)
    first, again = answers[1], answers[2]
    if not all(a.right for a in answers) or again.worker != first.worker or not again.reused:
        console.print("[red]demo failed:[/red] a wrong answer, or the repeated prompt did not land where it was cached")
        return 1
    console.print("demo ok")
    return 0


if __name__ == "__main__":
    os.environ["no_proxy"] = "127.0.0.1"  # a proxy of the environment is for the world outside
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
