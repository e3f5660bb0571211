"""The routing layer in front of scripted workers: one answer per request, whatever happens to the workers."""

import asyncio
from array import array
from typing import Any

import msgspec
import openai
import pytest
from scripted_worker import (
    BLOCK_SIZE,
    EOS,
    MAX_CONTEXT,
    TOKENIZER,
    ids_of,
    prompt_of,
    refuses,
    refuses_late,
    says,
    silent,
)

from kvstore import wire
from kvstore.connect import connect
from kvstore.registry import Registry
from kvstore.wire import SamplingParams
from router import errors
from router.config import PlacementSettings
from router.types import Delta, GenerationRequest, Placed

TEXT = "the quick brown fox jumps over the lazy dog"


def request(prompt: str = "hello", **options: Any) -> GenerationRequest:
    sampling = options.pop("sampling", SamplingParams(max_tokens=100))
    return GenerationRequest(
        model="demo", token_ids=TOKENIZER.encode(prompt), sampling=sampling, request_id="r1", **options
    )


async def test_text_tokens_and_timings(cluster) -> None:
    """The deltas add up to the result, placement comes before the first, and the metrics follow."""
    worker = await cluster.worker(says(TEXT, per_frame=3))
    worker.cached_tokens = 2
    router = await cluster.router()
    deltas: list[Delta] = []
    placed: list[Placed] = []
    result = await router.generation.generate(request(), deltas.append, placed.append)
    assert result.text == TEXT == "".join(d.text for d in deltas)
    assert result.token_ids == [*ids_of(TEXT), EOS] == [t for d in deltas for t in d.token_ids]
    assert [d.finish_reason for d in deltas] == [None] * (len(deltas) - 1) + ["stop"]
    assert placed == [result.placed]
    assert (result.finish_reason, result.stop_reason, result.cached_tokens) == ("stop", None, 2)
    assert result.ttft_ms > 0
    figures = router.metrics.model("demo")
    assert figures.generated_tokens == len(result.token_ids)
    assert figures.inflight == 0
    assert dict(figures.ttft_s.buckets())["+Inf"] == 1
    assert dict(figures.itl_s.buckets())["+Inf"] == len(result.token_ids) - len(deltas[0].token_ids)


async def test_logprobs(cluster) -> None:
    """Log-probabilities of tokens and prompt come through."""
    await cluster.worker(says("abc"))
    router = await cluster.router()
    result = await router.generation.generate(request(sampling=SamplingParams(logprobs=2, prompt_logprobs=1)))
    assert result.logprobs is not None
    assert [entry.token_id for entry in result.logprobs] == result.token_ids
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[0] is None


@pytest.mark.parametrize("per_frame", [1, 4, 1000])
async def test_stop_string(cluster, eventually, per_frame: int) -> None:
    """A stop string that spans tokens ends the text before it, and the sequence on the worker at once."""
    worker = await cluster.worker(says(TEXT, per_frame=per_frame, until=1000))
    router = await cluster.router()
    deltas: list[Delta] = []
    result = await router.generation.generate(request(stop=("ox ju",)), deltas.append)
    assert result.text == "the quick brown f" == "".join(d.text for d in deltas)
    assert (result.finish_reason, result.stop_reason) == ("stop", "ox ju")
    assert TOKENIZER.decode(result.token_ids).startswith("the quick brown fox ju")
    await eventually(lambda: worker.cancels == [worker.submits[0].rid])


async def test_include_stop(cluster) -> None:
    """On request the stop string stays in the text."""
    await cluster.worker(says(TEXT))
    router = await cluster.router()
    result = await router.generation.generate(request(stop=("fox",), include_stop=True))
    assert result.text == "the quick brown fox"


async def test_stop_token(cluster) -> None:
    """The token that ends a sequence is reported but has no text."""
    last = ids_of(TEXT)[-1]
    worker = await cluster.worker()

    def script(worker: Any, submit: wire.Submit) -> None:
        worker.emit(wire.Output(submit.rid, ids_of(TEXT), "stop", started=worker.started(submit)))

    worker.script = script
    router = await cluster.router()
    result = await router.generation.generate(request(sampling=SamplingParams(stop_token_ids=(last,))))
    assert result.stop_reason == last
    assert result.token_ids[-1] == last
    assert TEXT.startswith(result.text)
    assert result.text != TEXT


async def test_a_dead_worker_is_replaced_unnoticed(cluster, eventually) -> None:
    """When a worker dies in mid-stream, another one goes on from the tokens that were sent, and the text is whole."""
    first = await cluster.worker(says(TEXT, until=5))
    router = await cluster.router()
    deltas: list[Delta] = []
    placed: list[Placed] = []
    sampling = SamplingParams(max_tokens=50, min_tokens=7, seed=4)
    task = asyncio.create_task(router.generation.generate(request(sampling=sampling), deltas.append, placed.append))
    await eventually(lambda: sum(len(d.token_ids) for d in deltas) == 5)
    second = await cluster.worker(says(TEXT))
    await cluster.connected(router)
    await first.kill()
    result = await task
    assert result.text == TEXT == "".join(d.text for d in deltas)
    assert result.token_ids == [*ids_of(TEXT), EOS]
    assert [p.reason for p in placed] == ["load", "migration"]
    assert result.placed.instance == second.instance
    replay = second.submits[0]
    assert prompt_of(replay) == [*prompt_of(first.submits[0]), *ids_of(TEXT)[:5]]
    assert replay.generated == 5
    assert (replay.sampling.max_tokens, replay.sampling.min_tokens, replay.sampling.seed) == (50, 7, 4)
    assert router.metrics.model("demo").migrations == {"lost": 1}


async def test_waits_for_a_worker_to_come_back(cluster, eventually) -> None:
    """A request whose only worker lost its session waits for the next one."""
    worker = await cluster.worker(says(TEXT, until=5))
    router = await cluster.router()
    task = asyncio.create_task(router.generation.generate(request()))
    await eventually(lambda: worker.submits)
    worker.script = says(TEXT)
    worker.end_session("engine_failure")
    assert (await task).text == TEXT


async def test_no_worker_comes_back(cluster, eventually) -> None:
    """After the wait the client is told, once, that the worker failed."""
    worker = await cluster.worker()
    router = await cluster.router(worker_wait_s=0.2)
    task = asyncio.create_task(router.generation.generate(request()))
    await eventually(lambda: worker.submits)
    await worker.kill()
    with pytest.raises(errors.WorkerFailed):
        await task
    assert router.metrics.model("demo").inflight == 0
    assert router.metrics.model("demo").migrations == {}


async def test_nothing_left_to_generate(cluster, eventually) -> None:
    """A worker that dies after the last allowed token, before it could say so, costs no replay."""
    worker = await cluster.worker(says(TEXT, until=5))
    router = await cluster.router()
    deltas: list[Delta] = []
    task = asyncio.create_task(
        router.generation.generate(request(sampling=SamplingParams(max_tokens=5)), deltas.append)
    )
    await eventually(lambda: sum(len(d.token_ids) for d in deltas) == 5)
    await worker.kill()
    result = await task
    assert (result.finish_reason, len(result.token_ids)) == ("length", 5)
    assert deltas[-1].finish_reason == "length"


async def test_migration_can_be_switched_off(cluster, eventually) -> None:
    """With one attempt a lost worker is the client's error."""
    worker = await cluster.worker()
    await cluster.worker(says(TEXT))
    router = await cluster.router(max_attempts=1)
    tasks = [asyncio.create_task(router.generation.generate(request())) for _ in range(4)]
    await eventually(lambda: worker.submits)
    await worker.kill()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    failed = [r for r in results if isinstance(r, errors.WorkerFailed)]
    assert len(failed) == len(worker.submits)


@pytest.mark.parametrize("refusal", [refuses, refuses_late])
@pytest.mark.parametrize("code", sorted(wire.RETRYABLE - {"no_session"}))
async def test_another_worker_is_tried(cluster, code: wire.ErrorCode, refusal: Any) -> None:
    """A retryable refusal sends the request to another worker, and is no loss of the first, whenever it comes."""
    await cluster.worker(refusal(code))
    await cluster.worker(says(TEXT))
    router = await cluster.router(placement=PlacementSettings(policy="round-robin"))
    results = [await router.generation.generate(request()) for _ in range(3)]
    assert {r.text for r in results} == {TEXT}
    assert cluster.workers[0].submits
    lost = refusal is refuses_late and code == "engine_failure"
    assert set(router.metrics.model("demo").migrations) == {"lost" if lost else code}


@pytest.mark.parametrize("refusal", [refuses, refuses_late])
@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("invalid_request", errors.InvalidRequest),
        ("context_length_exceeded", errors.ContextLengthExceeded),
        ("overloaded", errors.Overloaded),
        ("draining", errors.Unavailable),
    ],
)
async def test_what_every_worker_refuses(
    cluster, code: wire.ErrorCode, error: type[errors.RouterError], refusal: Any
) -> None:
    """The client gets the workers' reason; only retryable ones are tried everywhere, and say when to come back."""
    workers = [await cluster.worker(refusal(code, "because")) for _ in range(2)]
    router = await cluster.router()
    with pytest.raises(error, match="because") as caught:
        await router.generation.generate(request())
    assert sum(len(w.submits) for w in workers) == (2 if code in wire.RETRYABLE else 1)
    assert (caught.value.retry_after_s is not None) == (code in wire.RETRYABLE)


async def test_an_error_in_mid_stream(cluster) -> None:
    """A request that fails on the worker is tried again elsewhere, and its error is told when it fails everywhere."""
    await cluster.worker(refuses_late("engine_failure", "out of memory"))
    router = await cluster.router(max_attempts=3)
    with pytest.raises(errors.WorkerFailed, match="out of memory"):
        await router.generation.generate(request())
    assert len(cluster.workers[0].submits) == 3


async def test_cancelling_frees_the_worker(cluster, eventually) -> None:
    """Cancelling the task sends one cancel and leaves nothing behind."""
    worker = await cluster.worker(silent)
    router = await cluster.router()
    task = asyncio.create_task(router.generation.generate(request()))
    await eventually(lambda: worker.submits)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: worker.cancels == [worker.submits[0].rid])
    connection = router.pool.connections()[0]
    assert (connection.inflight, connection.load.requests, router.generation.inflight) == (0, 0, 0)


async def test_deadline(cluster, eventually) -> None:
    """A request over its time ends with an error, on the worker too."""
    worker = await cluster.worker(silent)
    router = await cluster.router(request_timeout_s=0.1)
    with pytest.raises(errors.DeadlineExceeded):
        await router.generation.generate(request())
    await eventually(lambda: worker.cancels)


async def test_deadline_in_the_turn_of_a_loss(cluster, eventually) -> None:
    """A request whose deadline passes just as its worker is lost is not started again."""
    worker = await cluster.worker(silent)
    router = await cluster.router(drain_timeout_s=0.2)
    task = asyncio.create_task(router.generation.generate(request()))
    await eventually(lambda: worker.submits)
    (sequence,) = router.generation._sequences
    sequence.on_lost("gone")
    sequence.abort(errors.DeadlineExceeded("late"))
    with pytest.raises(errors.DeadlineExceeded):
        await asyncio.wait_for(task, 5)
    assert len(worker.submits) == 1


async def test_deadline_while_no_worker_is_there(cluster, eventually) -> None:
    """The deadline ends the wait for another worker."""
    worker = await cluster.worker(silent)
    router = await cluster.router(worker_wait_s=3600.0)
    task = asyncio.create_task(router.generation.generate(request()))
    await eventually(lambda: worker.submits)
    (sequence,) = router.generation._sequences
    await worker.kill()
    await eventually(lambda: sequence._worker is None)  # it waits for another one
    sequence.abort(errors.DeadlineExceeded("late"))
    with pytest.raises(errors.DeadlineExceeded):
        await asyncio.wait_for(task, 5)


async def test_drain_while_no_worker_is_there(cluster, eventually) -> None:
    """A client that waits for another worker when the router leaves is told so in the API's form."""
    worker = await cluster.worker(silent)
    router = await cluster.router(worker_wait_s=3600.0, drain_timeout_s=0.2)
    client = cluster.client(router)
    task = asyncio.create_task(client.completions.create(model="demo", prompt="hello"))
    await eventually(lambda: worker.submits)
    await worker.kill()
    await eventually(lambda: not router.pool.connections()[0].connected)
    await router.__aexit__(None, None, None)
    with pytest.raises(openai.InternalServerError, match="shutting down") as caught:
        await task
    assert caught.value.status_code == 503


async def test_a_failing_client_is_not_replayed(cluster) -> None:
    """A request whose own handler fails ends with an error, since the next worker would go on behind the lost text."""
    worker = await cluster.worker(says(TEXT))
    router = await cluster.router()

    def fail(delta: Delta) -> None:
        raise RuntimeError("broken handler")

    with pytest.raises(errors.WorkerFailed, match="the router failed"):
        await router.generation.generate(request(), fail)
    assert len(worker.submits) == 1


async def test_inflight_limit(cluster, eventually) -> None:
    """Beyond the limit requests are refused at once."""
    worker = await cluster.worker(silent)
    router = await cluster.router(max_inflight=1)
    task = asyncio.create_task(router.generation.generate(request()))
    await eventually(lambda: worker.submits)
    with pytest.raises(errors.Overloaded) as caught:
        await router.generation.generate(request())
    assert caught.value.retry_after_s
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("tokens", [MAX_CONTEXT, MAX_CONTEXT - 5])
async def test_too_long(cluster, tokens: int) -> None:
    """Prompt and max_tokens beyond the context are refused before any worker sees them."""
    worker = await cluster.worker(says(TEXT))
    router = await cluster.router()
    long = GenerationRequest(
        model="demo", token_ids=b"\5\0\0\0" * tokens, sampling=SamplingParams(max_tokens=10), request_id="r"
    )
    with pytest.raises(errors.ContextLengthExceeded, match=str(MAX_CONTEXT)):
        await router.generation.generate(long)
    assert worker.submits == []


async def test_unknown_model_and_no_worker(cluster, eventually) -> None:
    """A model that nobody serves is not found; one whose workers have just left is unavailable."""
    worker = await cluster.worker(says(TEXT))
    router = await cluster.router()
    unknown = GenerationRequest(model="other", token_ids=b"\5\0\0\0", sampling=SamplingParams(), request_id="r")
    with pytest.raises(errors.ModelNotFound):
        await router.generation.generate(unknown)
    await worker.lease.close()
    await eventually(lambda: not router.pool.connections())
    with pytest.raises(errors.Unavailable):
        await router.generation.generate(request())


async def test_a_leaving_worker_finishes_its_requests(cluster, eventually) -> None:
    """An instance that leaves the registry gets nothing new, and what it has in flight comes to its end."""
    worker = await cluster.worker(says(TEXT, until=5))
    router = await cluster.router()
    deltas: list[Delta] = []
    task = asyncio.create_task(router.generation.generate(request(), deltas.append))
    await eventually(lambda: sum(len(d.token_ids) for d in deltas) == 5)
    await worker.lease.close()
    await eventually(lambda: router.models.names() == [])
    worker.emit(wire.Output(worker.submits[0].rid, [*ids_of(TEXT)[5:], EOS], "stop"))
    assert (await task).text == TEXT
    await eventually(lambda: not router.pool.connections())


async def test_placed_where_the_prefix_is(cluster, eventually) -> None:
    """The worker that announced a prompt's blocks gets the prompt; another salt knows nothing of them."""
    workers = [await cluster.worker(says("ok")) for _ in range(4)]
    router = await cluster.router()
    prompt = "a long system prompt, " * 40
    held = workers[2].store(TOKENIZER.encode(prompt))
    model = router.models.get("demo")
    await eventually(lambda: router.pool.mirror(model).stats().blocks == held)
    for question in ("one", "two", "three"):
        result = await router.generation.generate(request(prompt + question))
        assert result.placed.instance == workers[2].instance
        assert result.placed.reused_blocks == held
        assert result.placed.reason == "kv"
    salted = await router.generation.generate(request(prompt, cache_salt="tenant"))
    assert (salted.placed.reused_blocks, salted.placed.reason) == (0, "load")


async def test_placed_where_the_prefix_probably_is(cluster, eventually) -> None:
    """Of workers that announce no blocks, the one that computed a prompt, and its answer, gets what begins alike; until
    its session is lost, which may have been its engine's end."""
    workers = [await cluster.worker(says(TEXT, per_frame=5), kv_events=False) for _ in range(3)]
    router = await cluster.router()
    prompt = "a long system prompt, " * 40
    first = (await router.generation.generate(request(prompt))).placed
    assert (first.reused_blocks, first.reason) == (0, "load")
    known = TOKENIZER.encode(prompt) + array("I", ids_of(TEXT)).tobytes()
    turn = msgspec.structs.replace(request(), token_ids=known + TOKENIZER.encode(" and so on"))
    later = (await router.generation.generate(turn)).placed
    assert (later.instance, later.reason) == (first.instance, "kv")
    assert later.reused_blocks == len(known) // 4 // BLOCK_SIZE
    holder = next(worker for worker in workers if worker.instance == first.instance)
    holder.end_session("closed")
    connections = {c.instance: c for c in router.pool.connections()}
    await eventually(lambda: connections[first.instance].sessions == 2)
    assert (await router.generation.generate(request(prompt))).placed.reused_blocks == 0


async def test_round_robin(cluster) -> None:
    """The round robin policy gives each worker its share."""
    workers = [await cluster.worker(says("ok")) for _ in range(3)]
    router = await cluster.router(placement=PlacementSettings(policy="round-robin"))
    for _ in range(9):
        await router.generation.generate(request())
    assert [len(w.submits) for w in workers] == [3, 3, 3]


async def test_round_robin_of_two_models(cluster) -> None:
    """Each model has turns of its own, and a request that is tried twice takes one of them."""
    first = [await cluster.worker(says("ok")) for _ in range(2)]
    second = [await cluster.worker(says("ok"), model="other") for _ in range(2)]
    router = await cluster.router(placement=PlacementSettings(policy="round-robin"))
    await cluster.connected(router)
    for _ in range(6):
        await router.generation.generate(request())
        await router.generation.generate(msgspec.structs.replace(request(), model="other"))
    assert [len(w.submits) for w in first + second] == [3, 3, 3, 3]


async def test_a_burst_spreads(cluster) -> None:
    """Requests that come at once, before any report, do not all go to one worker."""
    workers = [await cluster.worker(silent) for _ in range(4)]
    router = await cluster.router()
    tasks = [asyncio.create_task(router.generation.generate(request(f"prompt {n} " * 30))) for n in range(40)]
    await asyncio.sleep(0)
    loads = [c.load.requests for c in router.pool.connections()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert len(workers) == 4
    assert sum(loads) == 40
    assert max(loads) <= 14


async def test_redis_lost(cluster, eventually, redis_server) -> None:
    """Without Redis requests flow on, and the gauge says so; a worker that dies meanwhile is found out all the same."""
    async with connect(redis_server.url) as redis:
        cluster.registry = Registry(redis, cluster.keys)
        first, second = await cluster.worker(says(TEXT)), await cluster.worker(says(TEXT))
        router = await cluster.router(redis_url=redis_server.url)
        redis_server.kill()
        await eventually(lambda: not router.pool.redis_connected)
        assert b"dynamo_llm_router_redis_connected 0.0" in router.metrics.render()
        assert (await router.generation.generate(request())).text == TEXT
        await first.kill()
        for _ in range(4):
            assert (await router.generation.generate(request())).placed.instance == second.instance
