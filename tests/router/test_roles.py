"""Roles that come, go and change, and settings that change, while requests flow."""

import asyncio
import logging

import pytest
from prefill_scripts import PARAMS, TEXT, finish_prefill, hands_over
from scripted_worker import TOKENIZER, says, silent

from kvstore.wire import SamplingParams
from router import errors
from router.config import DisaggSettings
from router.types import GenerationRequest

ALWAYS = DisaggSettings(remote_prefill="always", max_local_prefill_tokens=0)


def request(prompt: str = "hello there, " * 10) -> GenerationRequest:
    return GenerationRequest(
        model="demo", token_ids=TOKENIZER.encode(prompt), sampling=SamplingParams(max_tokens=100), request_id="r1"
    )


async def test_prefill_workers_come_and_go(cluster, eventually) -> None:
    """Decode workers compute prompts themselves while no prefill worker is there."""
    decode = await cluster.worker(says(TEXT), role="decode")
    router = await cluster.router(disagg=ALWAYS)
    await router.generation.generate(request())
    prefill = await cluster.worker(hands_over(), role="prefill")
    await cluster.connected(router)
    await router.generation.generate(request())
    await prefill.lease.close()
    await eventually(lambda: not router.pool.prefill_workers("demo"))
    await router.generation.generate(request())
    assert [submit.kv_transfer_params for submit in decode.submits] == [None, PARAMS, None]


async def test_only_prefill_workers_serve_nobody(cluster) -> None:
    """A model without a worker that generates is not ready."""
    await cluster.worker(hands_over(), role="prefill")
    decode = await cluster.worker(says(TEXT), role="decode")
    router = await cluster.router(disagg=ALWAYS)
    await decode.change_role("prefill")
    while router.pool.can_serve():
        await router.pool.wait_for_change(5.0)
    with pytest.raises(errors.Unavailable):
        await router.generation.generate(request())


async def test_aggregated_workers_serve_whole_requests(cluster) -> None:
    """Prefill workers beside them change nothing for them."""
    prefill = await cluster.worker(hands_over(), role="prefill")
    agg = await cluster.worker(says(TEXT))
    router = await cluster.router(disagg=ALWAYS)
    assert (await router.generation.generate(request())).text == TEXT
    assert prefill.submits == []
    assert agg.submits[0].kv_transfer_params is None
    assert router.metrics.model("demo").disagg.prefills == {}


async def test_a_worker_changes_its_role(cluster, eventually) -> None:
    """From then on it gets what its new role is for; what it had in flight comes to its end; nobody reconnects."""
    first = await cluster.worker(silent, role="agg")
    second = await cluster.worker(says(TEXT), role="decode")
    router = await cluster.router(disagg=ALWAYS)
    blocked = [asyncio.create_task(router.generation.generate(request(f"{n} " * 60))) for n in range(4)]
    await eventually(lambda: first.submits)
    await first.change_role("prefill")
    await eventually(lambda: len(router.pool.prefill_workers("demo")) == 1)
    whole = len(first.submits)
    for submit in list(first.submits):
        assert submit.kv_transfer_params is None
        says(TEXT)(first, submit)
    assert [result.text for result in await asyncio.gather(*blocked)] == [TEXT] * 4
    first.script = hands_over()
    assert (await router.generation.generate(request())).placed.prefill_instance == first.instance
    await first.change_role("agg")
    await eventually(lambda: not router.pool.prefill_workers("demo"))
    first.script = says(TEXT)
    for n in range(6):
        await router.generation.generate(request(f"another prompt {n}"))
    assert [s.kv_transfer_params for s in first.submits[whole:]] == [
        {"do_remote_decode": True, "do_remote_prefill": False},
        *[None] * (len(first.submits) - whole - 1),
    ]
    assert (len(first.sessions), len(second.sessions)) == (1, 1)


async def test_a_prefill_worker_becomes_a_decode_worker_under_way(cluster, eventually) -> None:
    """The prefill that it has is still handed over by it."""
    prefill = await cluster.worker(silent, role="prefill")
    decode = await cluster.worker(says(TEXT), role="decode")
    router = await cluster.router(disagg=ALWAYS)
    task = asyncio.create_task(router.generation.generate(request()))
    await eventually(lambda: prefill.submits)
    await prefill.change_role("decode")
    await eventually(lambda: not router.pool.prefill_workers("demo"))
    finish_prefill(prefill, prefill.submits[0], params=PARAMS)
    result = await task
    assert (result.text, result.placed.prefill_instance) == (TEXT, prefill.instance)
    assert decode.submits[0].kv_transfer_params == PARAMS


async def test_settings_change_live(cluster, eventually, caplog) -> None:
    """A setting in the registry takes effect with the next request, a broken one not at all, a deleted one ends."""
    decode = await cluster.worker(says(TEXT), role="decode")
    await cluster.worker(hands_over(), role="prefill")
    router = await cluster.router(disagg=ALWAYS)

    async def is_remote() -> bool:
        result = await router.generation.generate(request())
        assert result.text == TEXT
        return bool(result.placed.prefill_instance)

    assert await is_remote()
    await cluster.registry.set_setting("max_local_prefill_tokens", 1000)
    await eventually(lambda: router.settings.current.max_local_prefill_tokens == 1000)
    assert not await is_remote()
    with caplog.at_level(logging.WARNING, "router.live_settings"):
        await cluster.registry.set_setting("max_local_prefill_tokens", "few")
        await eventually(lambda: caplog.records)
        assert not await is_remote()
        await cluster.registry.set_setting("remote_prefill", "never")
        await cluster.registry.set_setting("max_local_prefill_tokens", None)
        await eventually(lambda: router.settings.current.max_local_prefill_tokens == 0)
    assert len(caplog.records) == 1
    assert not await is_remote()
    await cluster.registry.set_setting("remote_prefill", None)
    await eventually(lambda: router.settings.current == ALWAYS)
    assert await is_remote()
    figures = router.metrics.model("demo").disagg.prefills
    assert figures == {("remote", "always"): 2, ("local", "short"): 2, ("local", "never"): 1}
    assert len(decode.submits) == 5


async def test_settings_are_known_before_the_first_request(cluster, eventually) -> None:
    """What was set before the router started is in force when it serves."""
    await cluster.worker(says(TEXT), role="decode")
    await cluster.registry.set_setting("prefill_attempts", 7)
    router = await cluster.router(disagg=ALWAYS)
    assert router.settings.current.prefill_attempts == 7


async def test_requests_flow_while_roles_change(cluster, eventually) -> None:
    """Workers that change their roles all the time, never all at once, cost no request its answer."""
    for role in ("prefill", "decode", "decode"):
        await cluster.worker(role=role)

    def answers(worker, submit) -> None:
        (hands_over() if submit.sampling.max_tokens == 1 else says(TEXT))(worker, submit)

    for worker in cluster.workers:
        worker.script = answers
    router = await cluster.router(disagg=ALWAYS)
    tasks = []
    for turn in range(9):
        tasks += [asyncio.create_task(router.generation.generate(request(f"{turn} {n} " * 20))) for n in range(5)]
        changing = cluster.workers[turn % 3]
        await changing.change_role("decode" if changing.role == "prefill" else "prefill")
        if all(worker.role == "prefill" for worker in cluster.workers):
            await cluster.workers[(turn + 1) % 3].change_role("decode")
        roles = sorted(worker.role for worker in cluster.workers)
        await eventually(lambda roles=roles: sorted(c.card.role for c in router.pool.connections()) == roles)
    assert [result.text for result in await asyncio.gather(*tasks)] == [TEXT] * 45
