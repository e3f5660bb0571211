"""The OpenAI API with the real client, over the network, in front of scripted workers."""

import asyncio
import math
import threading
from typing import Any

import msgspec
import openai
import pytest
from scripted_worker import EOS, MAX_CONTEXT, TOKENIZER, ids_of, prompt_of, refuses, says, silent

from kvstore import wire

TEXT = "Hello, wörld €5 😀!"
MESSAGES: Any = [{"role": "user", "content": "hi"}]
PROMPT = "<|begin|><|user|>hi<|end|><|assistant|>"
TOKENS = [*ids_of(TEXT), EOS]


async def test_chat(cluster) -> None:
    """A chat completion has text, finish reason, usage, and says where it was served."""
    worker = await cluster.worker(says(TEXT))
    worker.cached_tokens = 4
    client = cluster.client(await cluster.router())
    raw = await client.chat.completions.with_raw_response.create(model="demo", messages=MESSAGES, max_tokens=64)
    answer = raw.parse()
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    prompt = prompt_of(worker.submits[0])
    assert prompt == ids_of(PROMPT)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), len(TOKENS))
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    assert raw.headers["x-dynamo-instance"] == worker.instance
    assert raw.headers["x-dynamo-prompt-blocks"] == str(len(prompt) // 16)
    assert raw.headers["x-dynamo-reused-blocks"] == "0"


@pytest.mark.parametrize("per_frame", [1, 3, 100])
async def test_chat_stream(cluster, per_frame: int) -> None:
    """A stream is the role, the text in whole characters, the finish reason, and the usage where asked for."""
    await cluster.worker(says(TEXT, per_frame=per_frame))
    client = cluster.client(await cluster.router())
    stream = await client.chat.completions.create(
        model="demo", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(texts) == TEXT
    assert not any("\ufffd" in text for text in texts)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(TOKENS)
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


async def test_no_usage_chunk_unasked(cluster) -> None:
    """Without `include_usage` the last chunk is the one with the finish reason."""
    await cluster.worker(says(TEXT))
    client = cluster.client(await cluster.router())
    chunks = [c async for c in await client.chat.completions.create(model="demo", messages=MESSAGES, stream=True)]
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert "usage" not in chunks[-1].model_fields_set


@pytest.mark.parametrize("stream", [False, True])
async def test_choices(cluster, stream: bool) -> None:
    """`n` choices draw from seeds of their own and come with their index; the prompt counts once."""
    worker = await cluster.worker(says(TEXT))
    client = cluster.client(await cluster.router())
    options: Any = {"model": "demo", "messages": MESSAGES, "n": 3, "seed": 7}
    texts: dict[int, str] = {}
    if stream:
        async for chunk in await client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        ):
            usage = chunk.usage
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    else:
        answer = await client.chat.completions.create(**options)
        usage = answer.usage
        texts = {choice.index: choice.message.content for choice in answer.choices}
    assert texts == {0: TEXT, 1: TEXT, 2: TEXT}
    assert sorted(s.sampling.seed for s in worker.submits) == [7, 8, 9]
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids_of(PROMPT)), 3 * len(TOKENS))


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings(cluster, eventually, stream: bool) -> None:
    """A stop string is not part of the text, streamed or not, and the worker is told to stop."""
    worker = await cluster.worker(says("one two three four", until=100))
    client = cluster.client(await cluster.router())
    options: Any = {"model": "demo", "messages": MESSAGES, "stop": ["wo th", "never"]}
    if stream:
        chunks = [c async for c in await client.chat.completions.create(**options, stream=True)]
        text = "".join(c.choices[0].delta.content or "" for c in chunks)
        finish = chunks[-1].choices[0].finish_reason
    else:
        answer = await client.chat.completions.create(**options)
        text, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert (text, finish) == ("one t", "stop")
    await eventually(lambda: worker.cancels)


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs(cluster, stream: bool) -> None:
    """Each token has its log-probability, bytes and alternatives; minus infinity becomes a number."""
    await cluster.worker(says(TEXT, per_frame=2))
    client = cluster.client(await cluster.router())
    options: Any = {"model": "demo", "messages": MESSAGES, "logprobs": True, "top_logprobs": 3}
    entries: list[Any] = []
    if stream:
        async for chunk in await client.chat.completions.create(**options, stream=True):
            if chunk.choices[0].logprobs:
                entries += chunk.choices[0].logprobs.content
    else:
        entries = (await client.chat.completions.create(**options)).choices[0].logprobs.content
    assert b"".join(bytes(e.bytes) for e in entries) == b"".join(TOKENIZER.token_bytes(t) for t in TOKENS)
    assert all(e.logprob == -0.5 and len(e.top_logprobs) == 3 for e in entries)
    assert entries[0].top_logprobs[2].logprob == -9999.0


async def test_sampling_parameters(cluster) -> None:
    """What a client asks for reaches the worker, OpenAI's fields and those of vLLM's users."""
    worker = await cluster.worker(says("ok"))
    client = cluster.client(await cluster.router())
    await client.chat.completions.create(
        model="demo",
        messages=MESSAGES,
        max_completion_tokens=9,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        logit_bias={"5": -100},
        seed=3,
        extra_body={
            "top_k": 4,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "min_tokens": 2,
            "ignore_eos": True,
            "stop_token_ids": [7],
            "cache_salt": "tenant",
            "priority": 2,
            "unheard_of": {"a": 1},
        },
    )
    (submit,) = worker.submits
    assert submit.sampling == wire.SamplingParams(
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        seed=3,
        repetition_penalty=1.1,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        logit_bias={5: -100.0},
        stop_token_ids=(7,),
        min_tokens=2,
        ignore_eos=True,
    )
    assert (submit.cache_salt, submit.priority) == ("tenant", 2)


async def test_messages(cluster) -> None:
    """Text parts are joined, a developer is the system, tools and template options reach the template."""
    worker = await cluster.worker(says("ok"))
    client = cluster.client(await cluster.router())
    tool: Any = {"type": "function", "function": {"name": "add", "parameters": {}}}
    await client.chat.completions.create(
        model="demo",
        messages=[
            {"role": "developer", "content": "brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ],
    )
    await client.chat.completions.create(model="demo", messages=MESSAGES, tools=[tool])
    prompts = [TOKENIZER.decode(prompt_of(s), skip_special_tokens=False) for s in worker.submits]
    assert prompts[0] == "<|begin|><|system|>brief<|end|><|user|>a\nb<|end|><|assistant|>"
    assert '{"name": "add", "parameters": {}}' in prompts[1]


async def test_tool_call_arguments_become_objects(cluster) -> None:
    """Arguments that a client sends back as a text of JSON are an object for the template."""
    worker = await cluster.worker(says("ok"))
    client = cluster.client(await cluster.router())
    call: Any = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
    await client.chat.completions.create(
        model="demo",
        messages=[*MESSAGES, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "2"}],
    )
    assert '"arguments": {"a": 1}' in TOKENIZER.decode(prompt_of(worker.submits[0]))


@pytest.mark.parametrize("stream", [False, True])
async def test_completion(cluster, stream: bool) -> None:
    """A text completion, whole and streamed; 16 tokens are the default."""
    worker = await cluster.worker(says(TEXT))
    client = cluster.client(await cluster.router())
    if stream:
        chunks = [c async for c in await client.completions.create(model="demo", prompt="once", stream=True)]
        text, finish = "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0].finish_reason
    else:
        answer = await client.completions.create(model="demo", prompt="once")
        text, finish = answer.choices[0].text, answer.choices[0].finish_reason
    assert (text, finish) == (TEXT, "stop")
    assert worker.submits[0].sampling.max_tokens == 16
    assert worker.submits[0].token_ids == TOKENIZER.encode("once")


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        (["once", "upon"], [ids_of("once"), ids_of("upon")]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
async def test_prompts(cluster, prompt: Any, wanted: list[list[int]]) -> None:
    """Texts and token ids, one or many; choices come prompt by prompt."""
    worker = await cluster.worker(says("ok"))
    client = cluster.client(await cluster.router())
    answer = await client.completions.create(model="demo", prompt=prompt, n=2, extra_body={"add_special_tokens": False})
    assert [c.index for c in answer.choices] == list(range(2 * len(wanted)))
    assert [prompt_of(s) for s in worker.submits] == [p for p in wanted for _ in range(2)]
    assert answer.usage.prompt_tokens == sum(map(len, wanted))


async def test_echo_and_logprobs(cluster) -> None:
    """An echo puts the prompt before the text, with log-probabilities and offsets for both."""
    worker = await cluster.worker(says("ok", finish="length"))
    client = cluster.client(await cluster.router())
    answer = await client.completions.create(model="demo", prompt="once", echo=True, logprobs=2)
    (choice,) = answer.choices
    assert choice.text == "onceok"
    assert "".join(choice.logprobs.tokens) == "onceok"
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.top_logprobs[-1] == {
        TOKENIZER.decode([ids_of("ok")[-1]]): -0.5,
        TOKENIZER.decode([ids_of("ok")[-1] + 1]): -1.5,
    }
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        assert choice.text[offset:].startswith(token)
    assert worker.submits[0].sampling.prompt_logprobs == 2


async def test_scoring_a_prompt(cluster) -> None:
    """With echo and no new tokens the answer is the prompt and its log-probabilities alone."""
    await cluster.worker(says("ok"))
    client = cluster.client(await cluster.router())
    answer = await client.completions.create(model="demo", prompt="once", echo=True, logprobs=1, max_tokens=0)
    assert answer.choices[0].text == "once"
    assert len(answer.choices[0].logprobs.tokens) == len(ids_of("once"))
    assert answer.usage.completion_tokens == 0


async def test_streamed_offsets(cluster) -> None:
    """Text offsets go on from chunk to chunk."""
    await cluster.worker(says("one two three"))
    client = cluster.client(await cluster.router())
    tokens: list[str] = []
    offsets: list[int] = []
    async for chunk in await client.completions.create(model="demo", prompt="x", logprobs=1, stream=True):
        if chunk.choices[0].logprobs:
            tokens += chunk.choices[0].logprobs.tokens
            offsets += chunk.choices[0].logprobs.text_offset
    assert offsets == [len("".join(tokens[:n])) for n in range(len(tokens))]


async def test_models(cluster) -> None:
    """The models that have workers, and one of them by its name."""
    await cluster.worker(silent)
    client = cluster.client(await cluster.router())
    assert [m.id async for m in client.models.list()] == ["demo"]
    assert (await client.models.retrieve("demo")).model_dump()["max_model_len"] == MAX_CONTEXT
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other/model")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"n": 1.5}, "n"),
        ({"logprobs": True, "top_logprobs": 50}, "top_logprobs"),
        ({"seed": 2**64}, "seed"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop": ["x"] * 100}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": "x"}]}, "messages[0].tool_calls"),
        ({"logit_bias": {"5": 500}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ],
)
async def test_wrong_values(cluster, change: dict[str, Any], param: str) -> None:
    """Each wrong value is a 400 in OpenAI's form that names the field."""
    worker = await cluster.worker(says(TEXT))
    client = cluster.client(await cluster.router())
    body = {"model": "demo", "messages": MESSAGES, **change}
    with pytest.raises(openai.BadRequestError) as caught:
        await client.post("/chat/completions", body=body, cast_to=object)
    error = caught.value.body
    assert error["type"] == "invalid_request_error"  # type: ignore[index]
    assert error["param"] == param  # type: ignore[index]
    assert "\n" not in error["message"]  # type: ignore[index]
    assert worker.submits == []


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[1], 2]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 1000}, "n"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": True, "logprobs": 1, "stream": True}, "stream"),
        ({"prompt": "", "add_special_tokens": False}, "prompt"),
    ],
)
async def test_wrong_completions(cluster, change: dict[str, Any], param: str) -> None:
    """The same for text completions."""
    await cluster.worker(says(TEXT))
    client = cluster.client(await cluster.router())
    with pytest.raises(openai.BadRequestError) as caught:
        await client.post("/completions", body={"model": "demo", "prompt": "x", **change}, cast_to=object)
    assert caught.value.body["param"] == param  # type: ignore[index]


async def test_too_long(cluster) -> None:
    """A prompt over the context is a 400 with OpenAI's own code, long before its tokens are counted if need be."""
    await cluster.worker(says(TEXT))
    client = cluster.client(await cluster.router())
    for size in (MAX_CONTEXT * 2, MAX_CONTEXT * 300):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "é" * size}])
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": ""}] * (MAX_CONTEXT + 1)},
        {"messages": MESSAGES, "tools": [{}] * MAX_CONTEXT},
        {"prompt": [1] * (MAX_CONTEXT + 1), "echo": True},
    ],
)
async def test_too_many_parts(cluster, monkeypatch, body: dict[str, Any]) -> None:
    """What cannot fit by its number alone is refused before it is rendered or decoded."""
    await cluster.worker(says(TEXT))
    router = await cluster.router()
    model = router.models.get("demo")
    monkeypatch.setattr(model.chat_template, "render", None)
    monkeypatch.setattr(model.tokenizer, "decode", None)
    path = "/completions" if "prompt" in body else "/chat/completions"
    with pytest.raises(openai.BadRequestError) as caught:
        await cluster.client(router).post(path, body={"model": "demo", **body}, cast_to=object)
    assert caught.value.code == "context_length_exceeded"


async def test_large_chats_are_rendered_in_a_thread(cluster, monkeypatch) -> None:
    """Rendering many messages takes its time, which others should not wait for."""
    await cluster.worker(says(TEXT))
    router = await cluster.router()
    template = router.models.get("demo").chat_template
    threads = []

    def render(*args: Any, **options: Any) -> str:
        threads.append(threading.current_thread() is threading.main_thread())
        return type(template).render(template, *args, **options)

    monkeypatch.setattr(template, "render", render)
    for count in (1, 300):
        messages = [{"role": "user", "content": ""}] * count
        await cluster.client(router).chat.completions.create(model="demo", messages=messages)
    assert threads == [True, False]


async def test_unknown_model(cluster) -> None:
    """A model that nobody serves is a 404 with OpenAI's own code."""
    await cluster.worker(says(TEXT))
    client = cluster.client(await cluster.router())
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("code", "status"), [("overloaded", 429), ("draining", 503)])
async def test_overload(cluster, code: wire.ErrorCode, status: int, stream: bool) -> None:
    """When every worker refuses, the client is told at once when to come back, also in place of a stream."""
    await cluster.worker(refuses(code))
    client = cluster.client(await cluster.router())
    with pytest.raises(openai.APIStatusError) as caught:
        await client.chat.completions.create(model="demo", messages=MESSAGES, stream=stream)
    assert caught.value.status_code == status
    assert int(caught.value.response.headers["retry-after"]) >= 1


async def test_an_error_in_mid_stream(cluster, eventually) -> None:
    """After the first chunk an error can only be an event; the client raises it, and the stream ends."""
    worker = await cluster.worker(says("one two three", until=2))
    client = cluster.client(await cluster.router(max_attempts=1))
    stream = await client.chat.completions.create(model="demo", messages=MESSAGES, stream=True)
    texts: list[str] = []

    async def read() -> None:
        async for chunk in stream:
            texts.append(chunk.choices[0].delta.content or "")  # noqa: PERF401 - each is looked at while the next comes

    reader = asyncio.create_task(read())
    await eventually(lambda: "".join(texts) == TOKENIZER.decode(ids_of("one two three")[:2]))
    worker.end_session("engine_failure")
    with pytest.raises(openai.APIError, match="engine_failure"):
        await reader


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away(cluster, eventually, stream: bool) -> None:
    """The client's disconnect cancels its request on the worker."""
    worker = await cluster.worker(says("one two", until=1) if stream else silent)
    router = await cluster.router()
    client = cluster.client(router)
    task = asyncio.create_task(client.chat.completions.create(model="demo", messages=MESSAGES, stream=stream))
    await eventually(lambda: worker.submits)
    if stream:
        answer = await task
        async for _ in answer:
            break
        await answer.close()
    else:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await eventually(lambda: worker.cancels == [worker.submits[0].rid])
    await eventually(lambda: router.generation.inflight == 0)
    await eventually(lambda: ("chat_completions", "demo", "499") in router.metrics.requests)


async def test_many_clients_that_vanish(cluster, eventually) -> None:
    """Two hundred streams that vanish in mid-answer leave nothing behind, here or on the worker."""
    worker = await cluster.worker(says("one two three", until=2))
    router = await cluster.router()
    client = cluster.client(router)
    streams = await asyncio.gather(
        *(client.chat.completions.create(model="demo", messages=MESSAGES, stream=True) for _ in range(200))
    )
    assert router.generation.inflight == 200
    await asyncio.gather(*(stream.close() for stream in streams))
    await eventually(lambda: len(worker.cancels) == 200)
    await eventually(lambda: router.generation.inflight == 0)
    connection = router.pool.connections()[0]
    assert (connection.inflight, connection.load.requests, connection.load.prefill_blocks) == (0, 0, 0)


async def test_every_field_of_the_stream_is_as_documented(cluster) -> None:
    """The raw events: one JSON document each, and the end mark."""
    await cluster.worker(says("hi"))
    client = cluster.client(await cluster.router())
    async with client.chat.completions.with_streaming_response.create(
        model="demo", messages=MESSAGES, stream=True
    ) as raw:
        events = [line async for line in raw.iter_lines() if line]
    assert events[-1] == "data: [DONE]"
    documents = [msgspec.json.decode(event.removeprefix("data: ")) for event in events[:-1]]
    assert {d["object"] for d in documents} == {"chat.completion.chunk"}
    assert documents[0]["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert documents[-1]["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    assert all(math.isfinite(d["created"]) for d in documents)
