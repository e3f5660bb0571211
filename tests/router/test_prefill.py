"""Disaggregated requests in front of scripted workers: both stages, and who is asked for what."""

import asyncio
from typing import Any

import httpx2 as httpx
import pytest
from prefill_scripts import PARAMS, TEXT, finish_prefill, hands_over, hands_over_early
from scripted_worker import EOS, MAX_CONTEXT, TOKENIZER, ids_of, prompt_of, says, silent

from kvstore import wire
from kvstore.hashing import block_hashes, root_seed
from kvstore.wire import SamplingParams
from router.config import DisaggSettings, PlacementSettings
from router.types import Delta, GenerationRequest, Placed

ALWAYS = DisaggSettings(remote_prefill="always", max_local_prefill_tokens=0)


def request(prompt: str = "hello there, " * 10, **options: Any) -> GenerationRequest:
    sampling = options.pop("sampling", SamplingParams(max_tokens=100))
    token_ids = options.pop("token_ids", TOKENIZER.encode(prompt))
    return GenerationRequest(model="demo", token_ids=token_ids, sampling=sampling, request_id="r1", **options)


async def test_two_stages(cluster) -> None:
    """The prefill worker is asked for one token, what it hands over reaches the decode worker untouched, with the whole
    prompt, and its token is not part of the answer."""
    prefill = await cluster.worker(hands_over(), role="prefill")
    decode = await cluster.worker(says(TEXT), role="decode")
    prefill.cached_tokens = 5
    router = await cluster.router(disagg=ALWAYS)
    placed: list[Placed] = []
    asked = request(sampling=SamplingParams(max_tokens=100, min_tokens=9, seed=3, stop_token_ids=(900,)), priority=2)
    result = await router.generation.generate(asked, None, placed.append)
    assert result.text == TEXT
    assert result.token_ids == [*ids_of(TEXT), EOS]
    (first,), (second,) = prefill.submits, decode.submits
    assert first.kv_transfer_params == {"do_remote_decode": True, "do_remote_prefill": False}
    assert first.sampling == SamplingParams(max_tokens=1, min_tokens=1, seed=3, stop_token_ids=(900,))
    assert second.kv_transfer_params == PARAMS
    assert second.sampling == asked.sampling
    assert first.token_ids == second.token_ids == asked.token_ids
    assert (first.generated, second.generated) == (0, 0)
    assert (first.priority, second.priority) == (2, 2)
    assert placed == [result.placed]
    assert (result.placed.instance, result.placed.prefill_instance) == (decode.instance, prefill.instance)
    assert result.cached_tokens == 5
    assert prefill.cancels == decode.cancels == []
    figures = router.metrics.model("demo")
    assert figures.disagg.prefills == {("remote", "always"): 1}
    assert figures.disagg.failures == {}
    assert {instance for instance, _ in figures.placements} == {prefill.instance, decode.instance}
    assert [c.load.requests for c in router.pool.connections()] == [0, 0]


async def test_a_first_token_that_counts(cluster, eventually) -> None:
    """It is streamed before the decode worker was heard of, which goes on behind it."""
    prefill = await cluster.worker(hands_over(first_token_counts=True), role="prefill")
    decode = await cluster.worker(silent, role="decode")
    router = await cluster.router(disagg=ALWAYS)
    deltas: list[Delta] = []
    placed: list[Placed] = []
    task = asyncio.create_task(router.generation.generate(request(), deltas.append, placed.append))
    await eventually(lambda: decode.submits)
    assert [d.token_ids for d in deltas] == [ids_of(TEXT)[:1]]
    assert [p.prefill_instance for p in placed] == [prefill.instance]
    (submit,) = decode.submits
    assert submit.generated == 1
    assert prompt_of(submit) == [*prompt_of(prefill.submits[0]), ids_of(TEXT)[0]]
    assert submit.kv_transfer_params == {**PARAMS, "first_token_counts": True}
    says(TEXT)(decode, submit)
    result = await task
    assert result.text == TEXT == "".join(d.text for d in deltas)
    assert result.token_ids == [*ids_of(TEXT), EOS]
    assert dict(router.metrics.model("demo").ttft_s.buckets())["+Inf"] == 1


async def test_both_at_once(cluster, eventually) -> None:
    """What comes before the prefill's end goes to the decode worker at once; the prefill's end adds nothing."""
    prefill = await cluster.worker(hands_over_early, role="prefill")
    decode = await cluster.worker(silent, role="decode")
    router = await cluster.router(disagg=ALWAYS)
    task = asyncio.create_task(router.generation.generate(request()))
    await eventually(lambda: decode.submits)
    assert decode.submits[0].kv_transfer_params == PARAMS
    finish_prefill(prefill, prefill.submits[0])
    loads = [c.load for c in router.pool.prefill_workers("demo")]
    await eventually(lambda: [load.requests for load in loads] == [0])
    says(TEXT)(decode, decode.submits[0])
    result = await task
    assert result.token_ids == [*ids_of(TEXT), EOS]
    assert prefill.cancels == decode.cancels == []


@pytest.mark.parametrize("early", [False, True])
async def test_one_token_needs_no_decode_worker(cluster, eventually, early: bool) -> None:
    """With `max_tokens` 1 the prefill's token is the answer, and the worker is told to let go of the blocks."""

    def script(worker: Any, submit: wire.Submit) -> None:
        if early:
            hands_over_early(worker, submit)
        hands_over()(worker, submit)

    prefill = await cluster.worker(script, role="prefill")
    decode = await cluster.worker(says(TEXT), role="decode")
    router = await cluster.router(disagg=ALWAYS)
    placed: list[Placed] = []
    result = await router.generation.generate(request(sampling=SamplingParams(max_tokens=1)), None, placed.append)
    assert (result.token_ids, result.finish_reason) == (ids_of(TEXT)[:1], "length")
    assert result.placed.instance == prefill.instance == placed[-1].instance
    assert decode.submits == []
    await eventually(lambda: prefill.cancels == [prefill.submits[0].rid])


async def test_a_stop_token_needs_no_decode_worker(cluster) -> None:
    """A prefill that ends by a stop token is the whole answer, and the token has no text."""
    first = ids_of(TEXT)[0]
    await cluster.worker(hands_over("stop"), role="prefill")
    decode = await cluster.worker(says(TEXT), role="decode")
    router = await cluster.router(disagg=ALWAYS)
    result = await router.generation.generate(request(sampling=SamplingParams(stop_token_ids=(first,))))
    assert (result.text, result.token_ids, result.finish_reason, result.stop_reason) == ("", [first], "stop", first)
    assert decode.submits == []


async def test_a_stop_string_in_the_first_token(cluster, eventually) -> None:
    """A first token that counts and completes a stop string ends the sequence there."""
    prefill = await cluster.worker(hands_over(first_token_counts=True), role="prefill")
    decode = await cluster.worker(says(TEXT), role="decode")
    router = await cluster.router(disagg=ALWAYS)
    result = await router.generation.generate(request(stop=(TEXT[0],)))
    assert (result.finish_reason, result.stop_reason) == ("stop", TEXT[0])
    assert decode.submits == []
    await eventually(lambda: prefill.cancels == [prefill.submits[0].rid])


async def test_a_first_token_that_fills_the_context(cluster) -> None:
    """Nothing is left to decode after a first token that counts and is the context's last."""
    await cluster.worker(hands_over(first_token_counts=True), role="prefill")
    decode = await cluster.worker(says(TEXT), role="decode")
    router = await cluster.router(disagg=ALWAYS)
    long = request(token_ids=b"\5\0\0\0" * (MAX_CONTEXT - 1), sampling=SamplingParams())
    result = await router.generation.generate(long)
    assert (result.finish_reason, result.token_ids) == ("length", ids_of(TEXT)[:1])
    assert decode.submits == []


async def test_logprobs_of_the_prompt_come_from_the_prefill(cluster) -> None:
    """The decode worker did not compute the prompt: it is not asked for them."""
    prefill = await cluster.worker(hands_over(), role="prefill")
    decode = await cluster.worker(says(TEXT), role="decode")
    router = await cluster.router(disagg=ALWAYS)
    result = await router.generation.generate(request(sampling=SamplingParams(logprobs=1, prompt_logprobs=1)))
    assert result.prompt_logprobs is not None
    assert len(result.prompt_logprobs) == result.prompt_tokens
    assert [entry.token_id for entry in result.logprobs or ()] == result.token_ids
    assert prefill.submits[0].sampling.prompt_logprobs == 1
    assert decode.submits[0].sampling.prompt_logprobs is None


async def test_each_role_where_the_prefix_is(cluster, eventually) -> None:
    """Both workers are chosen by their caches, and what the decode worker holds counts as nothing to compute."""
    prefills = [await cluster.worker(hands_over(), role="prefill") for _ in range(3)]
    decodes = [await cluster.worker(says(TEXT), role="decode") for _ in range(3)]
    router = await cluster.router(disagg=DisaggSettings(remote_prefill="always", max_local_prefill_tokens=100))
    prompt = "a long system prompt, " * 40
    held = prefills[1].store(TOKENIZER.encode(prompt))
    decodes[2].store(TOKENIZER.encode(prompt[: len(prompt) // 2]))
    model = router.models.get("demo")
    await eventually(lambda: len(router.pool.mirror(model).match(hashes_of(prompt))) == 2)
    result = await router.generation.generate(request(prompt))
    assert (result.placed.instance, result.placed.prefill_instance) == (decodes[2].instance, prefills[1].instance)
    decodes[2].store(TOKENIZER.encode(prompt))
    await eventually(lambda: router.pool.mirror(model).match(hashes_of(prompt))[decodes[2].instance].blocks == held)
    result = await router.generation.generate(request(prompt))
    assert (result.placed.instance, result.placed.prefill_instance) == (decodes[2].instance, "")
    assert router.metrics.model("demo").disagg.prefills == {("remote", "always"): 1, ("local", "short"): 1}


def hashes_of(prompt: str) -> list[int]:
    hashes: list[int] = block_hashes(TOKENIZER.encode(prompt), 16, seed=root_seed("demo", "", "")).tolist()
    return hashes


async def test_round_robin_for_each_role(cluster) -> None:
    """In turn among the prefill workers and among the decode workers."""
    prefills = [await cluster.worker(hands_over(), role="prefill") for _ in range(2)]
    decodes = [await cluster.worker(says("ok"), role="decode") for _ in range(3)]
    router = await cluster.router(disagg=ALWAYS, placement=PlacementSettings(policy="round-robin"))
    for _ in range(6):
        await router.generation.generate(request())
    assert [len(w.submits) for w in prefills] == [3, 3]
    assert [len(w.submits) for w in decodes] == [2, 2, 2]


async def test_a_burst_spreads_over_the_decode_workers(cluster, eventually) -> None:
    """Requests whose prompts are still being computed count where they will be decoded."""
    prefill = await cluster.worker(silent, role="prefill")
    for _ in range(2):
        await cluster.worker(silent, role="decode")
    router = await cluster.router(disagg=ALWAYS)
    tasks = [asyncio.create_task(router.generation.generate(request(f"prompt {n} " * 30))) for n in range(20)]
    await eventually(lambda: len(prefill.submits) == 20)
    loads = sorted(c.load.requests for c in router.pool.workers("demo"))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(loads) == 20
    assert loads[0] >= 8
    assert [c.load.requests for c in router.pool.connections()] == [0, 0, 0]


async def test_what_a_decode_worker_tells_of_its_pull(cluster) -> None:
    """Its figures go into the metrics, and the rate into the next decision; others are ignored."""
    told: list[dict[str, Any]] = [
        {"transfer_ms": 20.0, "transferred_tokens": 400},
        {"transfer_ms": "long", "transferred_tokens": 400},
        {"transfer_ms": 10.0},
        {},
    ]

    def decodes(worker: Any, submit: wire.Submit) -> None:
        params = told[len(worker.submits) - 1]
        worker.emit(wire.Output(submit.rid, [EOS], "stop", kv_transfer_params=params))

    await cluster.worker(hands_over(), role="prefill")
    await cluster.worker(decodes, role="decode")
    router = await cluster.router(disagg=ALWAYS)
    for _ in told:
        await router.generation.generate(request())
    figures = router.metrics.model("demo").disagg
    assert figures.transfer_tokens_per_s == pytest.approx(20_000.0)
    assert figures.transferred_tokens == 400
    assert dict(figures.transfer_s.buckets())["+Inf"] == 2


async def test_headers_and_status(cluster) -> None:
    """Clients are told both instances, `/status` the roles and the settings in force."""
    prefill = await cluster.worker(hands_over(), role="prefill")
    decode = await cluster.worker(says(TEXT), role="decode")
    router = await cluster.router(disagg=ALWAYS)
    client = cluster.client(router)
    raw = await client.completions.with_raw_response.create(model="demo", prompt="hello " * 20, max_tokens=64)
    assert raw.parse().choices[0].text == TEXT
    assert raw.headers["x-dynamo-instance"] == decode.instance
    assert raw.headers["x-dynamo-prefill-instance"] == prefill.instance
    status = await client.get("../status", cast_to=object)
    assert status["models"][0]["roles"] == {"decode": 1, "prefill": 1}
    assert sorted(i["role"] for i in status["instances"]) == ["decode", "prefill"]
    assert status["disaggregation"]["remote_prefill"] == "always"


@pytest.mark.parametrize("streamed", [False, True])
async def test_kserve_tells_both_instances(cluster, streamed: bool) -> None:
    """As headers and among the answer's parameters."""
    prefill = await cluster.worker(hands_over(), role="prefill")
    decode = await cluster.worker(says(TEXT), role="decode")
    router = await cluster.router(disagg=ALWAYS)
    body = {"text_input": "hello " * 20, "max_tokens": 64, "stream": streamed}
    async with httpx.AsyncClient(timeout=20) as http:
        url = f"http://127.0.0.1:{router.http_port}/v2/models/demo/generate{'_stream' if streamed else ''}"
        answer = await http.post(url, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-dynamo-instance"] == decode.instance
    assert answer.headers["x-dynamo-prefill-instance"] == prefill.instance
    assert f'"prefill_instance":"{prefill.instance}"' in answer.text.replace(": ", ":")
