"""GB/s of KV block transfers between two worker processes, beside a raw NIXL loop, and what they add to a request.

First, two processes hold a pool each, in plain memory. The reader reads 1, 16, 256 and 4,096 of the writer's blocks,
chosen anywhere, by our layer (READ, stamp, release; the time is from the call to the word that it is done) and by a
loop of its own that does nothing but NIXL's minimum: a READ made from prepared lists, posted and polled for. Both use
the same blocks, in turns within one run, after a warm-up that does not count; the result is the median.

Then requests go to a disaggregated and to an aggregated cluster in turns (`_handover.py`).
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
os.environ.setdefault("UCX_LOG_LEVEL", "error")
os.environ.setdefault("UCX_NET_DEVICES", "lo")

import _handover
import numpy as np

from dynamo_llm.transfer import KvTransfer, Layout, TransferError

LAYERS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 24, 2, 64, 16
BLOCK_BYTES = LAYERS * 2 * KV_HEADS * HEAD_DIM * BLOCK_SIZE * 2
"""192 KiB: 16 tokens of Qwen2.5-0.5B in bfloat16, about the smallest model that people serve."""
TIMEOUT_S = 120.0


class Pool:
    """Blocks in plain memory, behind our layer."""

    def __init__(self, name: str, blocks: int) -> None:
        self.data = np.zeros(blocks * BLOCK_BYTES, dtype=np.uint8)
        self.data[:] = len(name)  # so that its pages are there
        layout = Layout(
            model="benchmark",
            dtype="bfloat16",
            layers=LAYERS,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            block_size=BLOCK_SIZE,
            block_bytes=BLOCK_BYTES,
            blocks=blocks,
            address=self.data.ctypes.data,
        )
        self.transfer = KvTransfer(name, layout, lambda request_id, blocks: None)


class Raw:
    """The least that NIXL lets one do, on the pool's own memory: an agent, prepared lists, a READ, a loop."""

    def __init__(self, name: str, data: Any) -> None:
        import nixl

        self._agent = nixl.nixl_agent(name, nixl.nixl_agent_config(enable_prog_thread=False))
        self._agent.register_memory([(data.ctypes.data, data.nbytes, 0, "")], "DRAM")
        self._own = self._lists("", data.ctypes.data, data.nbytes)
        self.metadata = self._agent.get_agent_metadata()
        self._peer, self._theirs = "", None

    def meet(self, metadata: bytes, address: int, size: int) -> None:
        self._peer = self._agent.add_remote_agent(metadata).decode()
        self._theirs = self._lists(self._peer, address, size)

    def read(self, remote: list[int], local: list[int]) -> float:
        """Seconds."""
        started_s = time.perf_counter()
        there, here = np.array(remote, dtype=np.int32), np.array(local, dtype=np.int32)
        handle = self._agent.make_prepped_xfer("READ", self._own, here, self._theirs, there)
        state = self._agent.transfer(handle)
        while state == "PROC":
            state = self._agent.check_xfer_state(handle)
        seconds = time.perf_counter() - started_s
        self._agent.release_xfer_handle(handle)
        if state != "DONE":
            raise SystemExit("the raw read failed")
        return seconds

    def poll(self) -> None:
        self._agent.get_new_notifs()

    def _lists(self, peer: str, address: int, size: int) -> Any:
        rows = np.zeros((size // BLOCK_BYTES, 3), dtype=np.uint64)
        rows[:, 0] = address + np.arange(len(rows), dtype=np.uint64) * np.uint64(BLOCK_BYTES)
        rows[:, 1] = BLOCK_BYTES
        return self._agent.prep_xfer_dlist(peer, rows, "DRAM")


# --- in the writer's process ------------------------------------------------------------------------------------------


def serve(blocks: int) -> None:
    """Pin the blocks that each line on stdin names; the answer is their parameters."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    pool = Pool("writer-1", blocks)
    raw = Raw("raw-writer", pool.data)
    hello = {"ours": pool.transfer.metadata.hex(), "raw": raw.metadata.hex(), "address": pool.data.ctypes.data}
    print(json.dumps(hello), file=answers)
    ended = threading.Event()
    poller = threading.Thread(target=_poll, args=(raw, ended))
    poller.start()
    for number, line in enumerate(sys.stdin):
        params = pool.transfer.exporter.pin(str(number), json.loads(line), TIMEOUT_S)
        print(json.dumps(params), file=answers)
    ended.set()
    poller.join()
    pool.transfer.close()


def _poll(raw: Raw, ended: threading.Event) -> None:
    """The raw writer answers connections as often as ours does."""
    while not ended.wait(0.001):
        raw.poll()


# --- in the reader's process ------------------------------------------------------------------------------------------


class Writer:
    """The other process."""

    def __init__(self, blocks: int) -> None:
        command = [sys.executable, __file__, "--serve", str(blocks)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.hello = self._read()

    def pin(self, blocks: list[int]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(blocks) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self._process.communicate()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the writer ended without an answer; its last words are above")
        return json.loads(line)


def pull(pool: Pool, params: dict[str, Any], local: list[int]) -> float:
    """Seconds from the call to its end."""
    ended, errors = threading.Event(), list[TransferError | None]()

    def on_done(error: TransferError | None) -> None:
        errors.append(error)
        ended.set()

    started_s = time.perf_counter()
    pool.transfer.puller.start(params, local, timeout_s=TIMEOUT_S, on_done=on_done)
    ended.wait()
    seconds = time.perf_counter() - started_s
    if errors[0] is not None:
        raise SystemExit(str(errors[0]))
    return seconds


def measure(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """GB/s by way and number of blocks, one value a round."""
    total = 2 * max(args.blocks)
    writer, pool = Writer(total), Pool("reader-1", total)
    raw = Raw("raw-reader", pool.data)
    pool.transfer.add_peer("writer-1", bytes.fromhex(writer.hello["ours"]))
    raw.meet(bytes.fromhex(writer.hello["raw"]), writer.hello["address"], total * BLOCK_BYTES)
    rates: dict[str, dict[str, list[float]]] = {way: {str(n): [] for n in args.blocks} for way in ("ours", "raw")}
    rng = random.Random(1)
    try:
        for turn in range(args.rounds + 2):
            for count in args.blocks:
                remote, local = (choose(rng, total, count, args.contiguous) for _ in range(2))
                for way in ("ours", "raw") if turn % 2 else ("raw", "ours"):
                    if way == "ours":
                        seconds = pull(pool, writer.pin(remote), local)
                    else:
                        seconds = raw.read(*sort_both(remote, local))
                    if turn > 1:  # the first two turns meet every page
                        rates[way][str(count)].append(count * BLOCK_BYTES / seconds / 1e9)
    finally:
        pool.transfer.close()
        writer.close()
    return rates


def choose(rng: random.Random, total: int, count: int, contiguous: bool) -> list[int]:
    first = rng.randrange(total - count)
    return list(range(first, first + count)) if contiguous else rng.sample(range(total), count)


def sort_both(remote: list[int], local: list[int]) -> tuple[list[int], list[int]]:
    """In the writer's order, as our layer does, so that both read the same bytes in the same order."""
    pairs = sorted(zip(remote, local, strict=True))
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def report(rates: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The JSON document's part on blocks. A ratio is the median of the rounds': both ways had the same moment."""
    return {
        "workload": {"block_bytes": BLOCK_BYTES, "rounds": args.rounds, "contiguous": args.contiguous},
        "transports": os.environ.get("UCX_TLS", "all"),
        "gb_per_s": {way: {n: round(statistics.median(v), 3) for n, v in of.items()} for way, of in rates.items()},
        "ratio_to_raw": {
            n: round(statistics.median(a / b for a, b in zip(rates["ours"][n], rates["raw"][n], strict=True)), 3)
            for n in rates["ours"]
        },
    }


def table(document: dict[str, Any]) -> str:
    """For people."""
    lines = []
    if "ratio_to_raw" in document:
        lines.append(f"{'blocks':>8} {'ours':>8} {'raw':>8} {'ratio':>7}   (GB/s, median)")
    for n, ratio in document.get("ratio_to_raw", {}).items():
        ours, raw = (document["gb_per_s"][way][n] for way in ("ours", "raw"))
        lines.append(f"{n:>8} {ours:>8.2f} {raw:>8.2f} {ratio:>7.2f}")
    for n, prompt in document.get("ms_by_prompt_tokens", {}).items():
        lines.append(f"prompt of {n} tokens, median ms")
        for name, figures in prompt.items():
            lines.append(f"{name:>15}: " + ", ".join(f"{what} {ms:.2f}" for what, ms in figures.items()))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    parser.add_argument("--blocks", type=int, nargs="*", default=[1, 16, 256, 4096], metavar="N", help="blocks a pull")
    lengths = [128, 1024, 1900]
    parser.add_argument("--prompts", type=int, nargs="*", default=lengths, metavar="N", help="tokens of a request")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds after the warm-up (default: 15)")
    parser.add_argument("--contiguous", action="store_true", help="blocks in a row instead of anywhere")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return 0
    document: dict[str, Any] = {"machine": {"cores": len(os.sched_getaffinity(0)), "cpu": platform.machine()}}
    try:
        if args.blocks:
            document |= report(measure(args), args)
    except TransferError as error:
        raise SystemExit(str(error)) from None
    if args.prompts:
        document["ms_by_prompt_tokens"] = _handover.measure(args.prompts, args.rounds)
    print(json.dumps(document, indent=2) if args.json else table(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
