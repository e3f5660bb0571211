"""Disaggregated requests that meet with failure: one answer, no request lost that could be computed, nothing kept."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
from prefill_scripts import (
    PARAMS,
    TEXT,
    cannot_pull,
    finish_prefill,
    hands_over,
    hands_over_early,
    takes_no_params,
)
from scripted_worker import EOS, TOKENIZER, ScriptedWorker, ids_of, refuses, refuses_late, says, silent

from kvstore import wire
from kvstore.wire import SamplingParams
from router import errors
from router.config import DisaggSettings
from router.types import Delta, GenerationRequest

ALWAYS = DisaggSettings(remote_prefill="always", max_local_prefill_tokens=0)


def request(prompt: str = "hello there, " * 10, **options: Any) -> GenerationRequest:
    return GenerationRequest(
        model="demo",
        token_ids=TOKENIZER.encode(prompt),
        sampling=SamplingParams(max_tokens=100),
        request_id="r1",
        **options,
    )


def failures_of(router: Any) -> dict[str, int]:
    failures: dict[str, int] = router.metrics.model("demo").disagg.failures
    return failures


def assert_nothing_is_left(router: Any) -> None:
    """No request is counted anywhere any more."""
    assert router.generation.inflight == 0
    assert [(c.load.requests, c.load.prefill_blocks, c.inflight) for c in router.pool.connections()] == [
        (0, 0, 0) for _ in router.pool.connections()
    ]


# --- the prefill worker ---


@pytest.mark.parametrize("refusal", [refuses, refuses_late])
@pytest.mark.parametrize("code", sorted(wire.RETRYABLE - {"no_session"}))
async def test_another_prefill_worker_is_tried(cluster, code: wire.ErrorCode, refusal: Any) -> None:
    """One that refuses for now, or loses the request, is followed by another one."""
    first = await cluster.worker(refusal(code), role="prefill")
    decode = await cluster.worker(says(TEXT), role="decode")
    router = await cluster.router(disagg=ALWAYS)
    second = await cluster.worker(hands_over(), role="prefill")
    await cluster.connected(router)
    for _ in range(8):  # equally good ones are drawn by lot
        assert (await router.generation.generate(request())).text == TEXT
    assert len(second.submits) == 8
    assert [submit.kv_transfer_params for submit in decode.submits] == [PARAMS] * 8
    assert failures_of(router) == ({code: len(first.submits)} if first.submits else {})
    assert router.metrics.model("demo").migrations == {}


@pytest.mark.parametrize("refusal", [refuses, refuses_late])
@pytest.mark.parametrize("code", ["overloaded", "engine_failure", "invalid_request", "context_length_exceeded"])
async def test_local_prefill_when_all_prefill_workers_refuse(cluster, code: wire.ErrorCode, refusal: Any) -> None:
    """The decode worker then gets a plain request; what no other would take either is asked only once."""
    prefills = [await cluster.worker(refusal(code), role="prefill") for _ in range(2)]
    decode = await cluster.worker(says(TEXT), role="decode")
    router = await cluster.router(disagg=ALWAYS)
    result = await router.generation.generate(request())
    assert (result.text, result.placed.prefill_instance) == (TEXT, "")
    assert decode.submits[0].kv_transfer_params is None
    tries = 2 if code in wire.RETRYABLE else 1
    assert sum(len(w.submits) for w in prefills) == tries
    assert failures_of(router) == {code: tries}
    assert router.metrics.model("demo").disagg.prefills == {("remote", "always"): tries, ("local", "failed"): 1}
    assert_nothing_is_left(router)


async def test_the_prefill_worker_dies_before(cluster, eventually) -> None:
    """One that is not there is not asked."""
    prefill = await cluster.worker(hands_over(), role="prefill")
    await cluster.worker(says(TEXT), role="decode")
    router = await cluster.router(disagg=ALWAYS)
    await prefill.kill()
    await eventually(lambda: not any(c.ready for c in router.pool.prefill_workers("demo")))
    assert (await router.generation.generate(request())).text == TEXT
    assert router.metrics.model("demo").disagg.prefills == {("local", "no_prefill_worker"): 1}


@pytest.mark.parametrize("spare", [False, True])
async def test_the_prefill_worker_dies_during(cluster, eventually, spare: bool) -> None:
    """Another one computes the prompt, or the decode worker does."""
    prefill = await cluster.worker(silent, role="prefill")
    decode = await cluster.worker(says(TEXT), role="decode")
    router = await cluster.router(disagg=ALWAYS)
    task = asyncio.create_task(router.generation.generate(request()))
    await eventually(lambda: prefill.submits)
    if spare:
        await cluster.worker(hands_over(), role="prefill")
        await cluster.connected(router)
    await prefill.kill()
    assert (await task).text == TEXT
    assert decode.submits[0].kv_transfer_params == (PARAMS if spare else None)
    assert failures_of(router) == {"lost": 1}


async def test_the_prefill_worker_dies_after(cluster, eventually) -> None:
    """What becomes of the pull is the decode worker's business: its request goes on."""
    prefill = await cluster.worker(hands_over(), role="prefill")
    decode = await cluster.worker(silent, role="decode")
    router = await cluster.router(disagg=ALWAYS)
    task = asyncio.create_task(router.generation.generate(request()))
    await eventually(lambda: decode.submits)
    await prefill.kill()
    await eventually(lambda: not any(c.connected for c in router.pool.prefill_workers("demo")))
    says(TEXT)(decode, decode.submits[0])
    assert (await task).text == TEXT
    assert len(decode.submits) == 1


@pytest.mark.parametrize("end", ["killed", "error"])
async def test_the_prefill_fails_under_a_waiting_decode_worker(cluster, eventually, end: str) -> None:
    """Of two that work at the same time the decode worker would wait in vain: its request is sent anew."""
    prefill = await cluster.worker(hands_over_early, role="prefill")
    decode = await cluster.worker(silent, role="decode")
    router = await cluster.router(disagg=ALWAYS)
    task = asyncio.create_task(router.generation.generate(request()))
    await eventually(lambda: decode.submits)
    decode.script = says(TEXT)
    if end == "killed":
        await prefill.kill()
    else:
        refuses_late("engine_failure")(prefill, prefill.submits[0])
    assert (await task).text == TEXT
    assert [submit.kv_transfer_params for submit in decode.submits] == [PARAMS, None]
    assert decode.cancels == [decode.submits[0].rid]
    assert failures_of(router) == {"lost" if end == "killed" else "engine_failure": 1}
    assert router.metrics.model("demo").migrations == {}


async def test_a_prefill_that_fails_after_the_pull_is_no_matter(cluster, eventually) -> None:
    """Once the decode worker has given a token, it has all that it needs."""
    prefill = await cluster.worker(hands_over_early, role="prefill")
    decode = await cluster.worker(says(TEXT, until=5), role="decode")
    router = await cluster.router(disagg=ALWAYS)
    deltas: list[Delta] = []
    task = asyncio.create_task(router.generation.generate(request(), deltas.append))
    await eventually(lambda: sum(len(d.token_ids) for d in deltas) == 5)
    await prefill.kill()
    await eventually(lambda: not any(c.connected for c in router.pool.prefill_workers("demo")))
    decode.emit(wire.Output(decode.submits[0].rid, [*ids_of(TEXT)[5:], EOS], "stop"))
    assert (await task).text == TEXT
    assert len(decode.submits) == 1


async def test_a_late_prefill_is_given_up(cluster, eventually) -> None:
    """After its time the worker is told to stop, and the decode worker computes the prompt."""
    prefill = await cluster.worker(silent, role="prefill")
    await cluster.worker(says(TEXT), role="decode")
    late = DisaggSettings(remote_prefill="always", max_local_prefill_tokens=0, prefill_timeout_s=0.05)
    router = await cluster.router(disagg=late)
    assert (await router.generation.generate(request())).text == TEXT
    assert failures_of(router) == {"late": 1}
    await eventually(lambda: prefill.cancels == [prefill.submits[0].rid])
    assert_nothing_is_left(router)


async def test_an_engine_that_hands_nothing_over(cluster) -> None:
    """A prefill that ends without `kv_transfer_params` was in vain, and no other one is tried."""
    prefill = await cluster.worker(says(TEXT[:3], per_frame=99, finish="length"), role="prefill")
    await cluster.worker(says(TEXT), role="decode")
    router = await cluster.router(disagg=ALWAYS)
    assert (await router.generation.generate(request())).text == TEXT
    assert len(prefill.submits) == 1
    assert failures_of(router) == {"no_params": 1}


# --- the decode worker ---


@pytest.mark.parametrize("refusal", [refuses, refuses_late])
@pytest.mark.parametrize("code", ["overloaded", "draining"])
async def test_the_decode_worker_refuses(cluster, code: wire.ErrorCode, refusal: Any) -> None:
    """Another decode worker gets the same, and the prompt is computed once."""
    prefill = await cluster.worker(hands_over(), role="prefill")
    decodes = [await cluster.worker(refusal(code), role="decode") for _ in range(2)]
    router = await cluster.router(disagg=ALWAYS)
    decodes.append(await cluster.worker(says(TEXT), role="decode"))
    await cluster.connected(router)
    for worker in decodes[:2]:
        worker.load = wire.Load()
    result = await router.generation.generate(request())
    assert (result.text, result.placed.instance) == (TEXT, decodes[2].instance)
    assert len(prefill.submits) == 1
    assert all(submit.kv_transfer_params == PARAMS for worker in decodes for submit in worker.submits)
    assert prefill.cancels == []


async def test_all_decode_workers_refuse(cluster, eventually) -> None:
    """Each is asked once, the client is told at once when to come back, and the prefill worker lets go."""
    prefill = await cluster.worker(hands_over(), role="prefill")
    decodes = [await cluster.worker(refuses("overloaded"), role="decode") for _ in range(2)]
    router = await cluster.router(disagg=ALWAYS, worker_wait_s=3600.0)
    with pytest.raises(errors.Overloaded) as caught:
        await router.generation.generate(request())
    assert caught.value.retry_after_s
    assert [len(w.submits) for w in decodes] == [1, 1]
    await eventually(lambda: prefill.cancels == [prefill.submits[0].rid])


async def test_the_decode_worker_dies_before_its_first_token(cluster, eventually) -> None:
    """Another one gets what was handed over."""
    prefill = await cluster.worker(hands_over(), role="prefill")
    first = await cluster.worker(silent, role="decode")
    router = await cluster.router(disagg=ALWAYS)
    task = asyncio.create_task(router.generation.generate(request()))
    await eventually(lambda: first.submits)
    second = await cluster.worker(says(TEXT), role="decode")
    await cluster.connected(router)
    await first.kill()
    result = await task
    assert (result.text, result.placed.reason) == (TEXT, "migration")
    assert second.submits[0].kv_transfer_params == PARAMS
    assert len(prefill.submits) == 1
    assert router.metrics.model("demo").migrations == {"lost": 1}


async def test_the_decode_worker_dies_in_mid_stream(cluster, eventually) -> None:
    """A running stream is replayed without what was handed over, whose blocks are gone."""
    prefill = await cluster.worker(hands_over(), role="prefill")
    first = await cluster.worker(says(TEXT, until=5), role="decode")
    router = await cluster.router(disagg=ALWAYS)
    deltas: list[Delta] = []
    task = asyncio.create_task(router.generation.generate(request(), deltas.append))
    await eventually(lambda: sum(len(d.token_ids) for d in deltas) == 5)
    second = await cluster.worker(says(TEXT), role="decode")
    await cluster.connected(router)
    await first.kill()
    result = await task
    assert result.text == TEXT == "".join(d.text for d in deltas)
    (replay,) = second.submits
    assert (replay.kv_transfer_params, replay.generated) == (None, 5)
    assert len(prefill.submits) == 1
    assert result.placed.prefill_instance == ""


async def test_both_workers_die_after_the_handover(cluster, eventually) -> None:
    """Nothing is left of the first prefill: the next decode worker's prompt is computed anew."""
    prefill = await cluster.worker(hands_over(), role="prefill")
    decode = await cluster.worker(silent, role="decode")
    router = await cluster.router(disagg=ALWAYS)
    task = asyncio.create_task(router.generation.generate(request()))
    await eventually(lambda: decode.submits)
    spares = [
        await cluster.worker(hands_over(other=1), role="prefill"),
        await cluster.worker(says(TEXT), role="decode"),
    ]
    await cluster.connected(router)
    await prefill.kill()
    await eventually(lambda: sum(c.connected for c in router.pool.prefill_workers("demo")) == 1)
    await decode.kill()
    assert (await task).text == TEXT
    assert spares[1].submits[0].kv_transfer_params == {**PARAMS, "other": 1}


@pytest.mark.parametrize("lease_s", [0.0, 3600.0])
async def test_a_decode_worker_that_would_come_too_late(cluster, lease_s: float) -> None:
    """Blocks may be others' when their lease is nearly over, and not every engine would notice: the next decode worker
    is not sent there, but computes the prompt."""
    asked: list[wire.Submit] = []

    def script(worker: ScriptedWorker, submit: wire.Submit) -> Any:
        asked.append(submit)
        return (refuses("overloaded") if len(asked) == 1 else says(TEXT))(worker, submit)

    prefill = await cluster.worker(hands_over(lease_s=lease_s), role="prefill")
    for _ in range(2):
        await cluster.worker(script, role="decode")
    router = await cluster.router(disagg=ALWAYS)
    assert (await router.generation.generate(request())).text == TEXT
    leased = {**PARAMS, "lease_s": lease_s}
    assert [submit.kv_transfer_params for submit in asked] == [leased, leased if lease_s else None]
    assert failures_of(router) == ({} if lease_s else {"expired": 1})
    assert len(prefill.submits) == 1


@pytest.mark.parametrize("script", [cannot_pull, takes_no_params])
async def test_a_pull_that_fails(cluster, eventually, script: Any) -> None:
    """What was handed over is of no use: the same worker computes the prompt, the other one lets go of its blocks."""
    prefill = await cluster.worker(hands_over(), role="prefill")
    decode = await cluster.worker(script, role="decode")
    router = await cluster.router(disagg=ALWAYS, max_attempts=1)
    result = await router.generation.generate(request())
    assert (result.text, result.placed.prefill_instance) == (TEXT, "")
    assert [submit.kv_transfer_params for submit in decode.submits] == [PARAMS, None]
    await eventually(lambda: prefill.cancels == [prefill.submits[0].rid])
    assert failures_of(router) == {"transfer": 1}
    assert router.metrics.model("demo").migrations == {}


async def test_what_the_decode_worker_refuses_either_way(cluster) -> None:
    """Its reason is the client's error."""
    await cluster.worker(hands_over(), role="prefill")
    decode = await cluster.worker(refuses("invalid_request", "because"), role="decode")
    router = await cluster.router(disagg=ALWAYS)
    with pytest.raises(errors.InvalidRequest, match="because"):
        await router.generation.generate(request())
    assert len(decode.submits) == 2
    assert_nothing_is_left(router)


@pytest.mark.parametrize("role", ["decode", "agg"])
async def test_the_decode_worker_leaves_during_the_prefill(cluster, eventually, role: Any) -> None:
    """Another decode worker takes what is handed over; an aggregated one computes the prompt."""
    prefill = await cluster.worker(silent, role="prefill")
    first = await cluster.worker(silent, role="decode")
    router = await cluster.router(disagg=ALWAYS)
    task = asyncio.create_task(router.generation.generate(request()))
    await eventually(lambda: prefill.submits)
    second = await cluster.worker(says(TEXT), role=role)
    await cluster.connected(router)
    await first.kill()
    await eventually(lambda: sum(c.ready for c in router.pool.workers("demo")) == 1)
    finish_prefill(prefill, prefill.submits[0], params=PARAMS)
    assert (await task).text == TEXT
    assert first.submits == []
    assert second.submits[0].kv_transfer_params == (PARAMS if role == "decode" else None)
    if role == "agg":
        assert failures_of(router) == {"no_decode_worker": 1}
        await eventually(lambda: prefill.cancels == [prefill.submits[0].rid])


async def test_no_decode_worker_comes_back(cluster, eventually) -> None:
    """The client is told after the wait, and the prefill worker lets go."""
    prefill = await cluster.worker(silent, role="prefill")
    decode = await cluster.worker(silent, role="decode")
    router = await cluster.router(disagg=ALWAYS, worker_wait_s=0.1)
    task = asyncio.create_task(router.generation.generate(request()))
    await eventually(lambda: prefill.submits)
    await decode.kill()
    await eventually(lambda: not any(c.ready for c in router.pool.workers("demo")))
    finish_prefill(prefill, prefill.submits[0], params=PARAMS)
    with pytest.raises(errors.Unavailable):
        await task
    await eventually(lambda: prefill.cancels == [prefill.submits[0].rid])
    assert_nothing_is_left(router)


async def test_a_decode_worker_comes_back(cluster, eventually) -> None:
    """A request that has been worked on waits for the next decode worker."""
    prefill = await cluster.worker(silent, role="prefill")
    decode = await cluster.worker(silent, role="decode")
    router = await cluster.router(disagg=ALWAYS)
    task = asyncio.create_task(router.generation.generate(request()))
    await eventually(lambda: prefill.submits)
    await decode.kill()
    await eventually(lambda: not any(c.ready for c in router.pool.workers("demo")))
    finish_prefill(prefill, prefill.submits[0], params=PARAMS)
    second = await cluster.worker(says(TEXT), role="decode")
    assert (await task).text == TEXT
    assert second.submits[0].kv_transfer_params == PARAMS


# --- the client ---


async def _until_prefill(eventually: Any, prefill: ScriptedWorker, decode: ScriptedWorker) -> None:
    prefill.script = silent
    await eventually(lambda: prefill.submits)


async def _until_both(eventually: Any, prefill: ScriptedWorker, decode: ScriptedWorker) -> None:
    prefill.script = hands_over_early
    await eventually(lambda: prefill.submits and decode.submits)


async def _until_pull(eventually: Any, prefill: ScriptedWorker, decode: ScriptedWorker) -> None:
    prefill.script = hands_over()
    await eventually(lambda: decode.submits)


STAGES = [_until_prefill, _until_both, _until_pull]


@pytest.mark.parametrize("leaves", ["cancelled", "deadline", "drain"])
@pytest.mark.parametrize("stage", STAGES)
async def test_the_client_leaves(cluster, eventually, stage: Callable[..., Any], leaves: str) -> None:
    """Whoever was asked is told, at each stage, whether it still works on the request or only holds its blocks."""
    prefill = await cluster.worker(role="prefill")
    decode = await cluster.worker(silent, role="decode")
    router = await cluster.router(disagg=ALWAYS)
    task = asyncio.create_task(router.generation.generate(request()))
    await stage(eventually, prefill, decode)
    if leaves == "cancelled":
        task.cancel()
    elif leaves == "deadline":
        next(iter(router.generation._sequences)).abort(errors.DeadlineExceeded("late"))
    else:
        router.generation.abandon()
    wanted = {"cancelled": asyncio.CancelledError, "deadline": errors.DeadlineExceeded, "drain": errors.Unavailable}
    with pytest.raises(wanted[leaves]):
        await task
    await eventually(lambda: prefill.cancels == [submit.rid for submit in prefill.submits] != [])
    await eventually(lambda: decode.cancels == [submit.rid for submit in decode.submits])
    assert_nothing_is_left(router)


async def test_the_client_leaves_in_mid_stream(cluster, eventually) -> None:
    """The prefill worker has nothing left to be told of; one that is still at it is stopped."""
    prefill = await cluster.worker(hands_over(), role="prefill")
    decode = await cluster.worker(says(TEXT, until=3), role="decode")
    router = await cluster.router(disagg=ALWAYS)
    for script in (hands_over(), hands_over_early):
        prefill.script = script
        deltas: list[Delta] = []
        task = asyncio.create_task(router.generation.generate(request(), deltas.append))
        await eventually(lambda deltas=deltas: sum(len(d.token_ids) for d in deltas) == 3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await eventually(lambda: decode.cancels == [submit.rid for submit in decode.submits])
    await eventually(lambda: prefill.cancels == [prefill.submits[1].rid])
    assert_nothing_is_left(router)


async def test_a_failing_client_ends_its_request(cluster, eventually) -> None:
    """A handler that fails on a first token that counts is not asked again."""
    prefill = await cluster.worker(hands_over(first_token_counts=True), role="prefill")
    decode = await cluster.worker(says(TEXT), role="decode")
    router = await cluster.router(disagg=ALWAYS)

    def fail(delta: Delta) -> None:
        raise RuntimeError("broken handler")

    with pytest.raises(errors.WorkerFailed, match="the router failed"):
        await router.generation.generate(request(), fail)
    assert decode.submits == []
    await eventually(lambda: prefill.cancels == [prefill.submits[0].rid])


# --- all at once ---


@pytest.mark.parametrize("seed", range(3))
async def test_no_request_fails_that_could_be_computed(cluster, seed: int) -> None:
    """Workers that refuse, fail, fall silent and cannot pull, at random: each request gets its whole answer once."""
    rng = random.Random(seed)
    prefill_scripts = [
        hands_over(),
        hands_over(first_token_counts=True),
        silent,
        refuses("overloaded"),
        refuses_late("engine_failure"),
        refuses("invalid_request"),
        says(TEXT[:3], per_frame=99, finish="length"),
    ]
    decode_scripts = [says(TEXT), says(TEXT, per_frame=4), cannot_pull, takes_no_params]
    refused: set[bytes] = set()

    def prefills(worker: ScriptedWorker, submit: wire.Submit) -> None:
        rng.choice(prefill_scripts)(worker, submit)

    def decodes(worker: ScriptedWorker, submit: wire.Submit) -> None:
        prompt = submit.token_ids[:100]
        if rng.random() < 0.1 and prompt not in refused:  # by one worker only, or it would be the client's error
            refused.add(prompt)
            refuses("overloaded")(worker, submit)
        rng.choice(decode_scripts)(worker, submit)

    for _ in range(3):
        await cluster.worker(prefills, role="prefill")
        await cluster.worker(decodes, role="decode")
    settings = DisaggSettings(remote_prefill="always", max_local_prefill_tokens=0, prefill_timeout_s=0.05)
    router = await cluster.router(disagg=settings, max_attempts=8)
    results = await asyncio.gather(*(router.generation.generate(request(f"{n} " * 40)) for n in range(60)))
    assert [result.text for result in results] == [TEXT] * 60
    assert {tuple(result.token_ids) for result in results} == {(*ids_of(TEXT), EOS)}
    assert_nothing_is_left(router)
