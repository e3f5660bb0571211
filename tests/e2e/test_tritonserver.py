"""The repository of the demo model on a plain tritonserver, as an operator starts it, for each kind of client."""

import asyncio
import contextlib
import json
import queue
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_http_aio
from command import running
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from kvstore.embedded import EmbeddedRedis

REPOSITORY = Path(__file__).parents[2] / "model_repository"
QUESTIONS = {
    "What is the capital of France?": "The capital of France is Paris.",
    "What is 12 + 30?": "12 + 30 = 42.",
    "Spell the word lantern.": "l-a-n-t-e-r-n.",
}
QUESTION, ANSWER = next(iter(QUESTIONS.items()))
OPTIONS = {"temperature": 0, "max_tokens": 40}


def prompt(question: str) -> str:
    return f"<|begin|><|user|>{question}<|end|><|assistant|>"


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with EmbeddedRedis(port=0) as server:
        yield server.url


@pytest.fixture(scope="module")
def server(redis_url: str) -> Iterator[dict[str, str]]:
    ports = [argument for kind in ("http", "grpc", "metrics") for argument in (f"--{kind}-port", "0")]
    with running("tritonserver", "--model-repository", str(REPOSITORY), "--redis", redis_url, *ports) as fields:
        yield fields


@pytest.fixture
async def router(router_url: str, eventually: Any) -> str:
    """Once it has found the server."""
    await eventually(lambda: is_ready(router_url), 30.0)
    return router_url


@pytest.fixture(scope="module")
def router_url(redis_url: str, server: dict[str, str]) -> Iterator[str]:
    with running("router", "--redis", redis_url, "--http-port", "0", "--grpc-port", "0") as fields:
        yield fields["first"]


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v2/models/demo/ready", timeout=10) as response:
            return response.status == 200
    except urllib.error.HTTPError as error:
        with error:
            return False


def post(url: str, body: dict[str, Any]) -> str:
    with urllib.request.urlopen(url, json.dumps(body).encode(), timeout=60) as response:
        return str(response.read().decode())


def inputs(module: Any, question: str, **flags: bool) -> list[Any]:
    """As vllm_backend's clients make them."""
    text = module.InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array([prompt(question).encode()], np.object_))
    options = module.InferInput("sampling_parameters", [1], "BYTES")
    options.set_data_from_numpy(np.array([json.dumps(OPTIONS).encode()], np.object_))
    made = [text, options]
    for name, value in flags.items():
        flag = module.InferInput(name, [1], "BOOL")
        flag.set_data_from_numpy(np.array([value]))
        made.append(flag)
    return made


@pytest.mark.parametrize(("question", "answer"), QUESTIONS.items())
def test_generate(server: dict[str, str], question: str, answer: str) -> None:
    """With curl's two forms: the whole, behind the prompt, and a stream of deltas."""
    url = f"http://{server['http']}/v2/models/demo/generate"
    whole = json.loads(post(url, {"text_input": prompt(question), **OPTIONS}))
    assert whole["text_output"] == prompt(question) + answer
    events = post(f"{url}_stream", {"text_input": prompt(question), "stream": True, **OPTIONS}).split("\n\n")
    deltas = [json.loads(event.removeprefix("data: "))["text_output"] for event in events if event]
    assert len(deltas) > 3
    assert "".join(deltas) == answer


def test_clients_of_tensorrtllm_backend(server: dict[str, str]) -> None:
    """Their tensors are [1, 1] and their names others, over HTTP and gRPC; the companion takes them."""
    url = f"http://{server['http']}/v2/models/demo.trtllm/generate"
    body = {"text_input": prompt(QUESTION), "max_tokens": 40, "bad_words": "", "stop_words": ""}
    assert json.loads(post(url, body))["text_output"] == prompt(QUESTION) + ANSWER

    given = {
        "text_input": np.array([[prompt(QUESTION).encode()]], np.object_),
        "max_tokens": np.array([[40]], np.int32),
        "stream": np.array([[True]]),
        "exclude_input_in_output": np.array([[True]]),
    }
    tensors = [
        triton_grpc.InferInput(name, value.shape, np_to_triton_dtype(value.dtype)) for name, value in given.items()
    ]
    for tensor, value in zip(tensors, given.values(), strict=True):
        tensor.set_data_from_numpy(value)
    answers: queue.Queue[Any] = queue.Queue()
    deltas = []
    with triton_grpc.InferenceServerClient(server["grpc"]) as client:
        client.start_stream(lambda result, error: answers.put(error or result))
        client.async_stream_infer("demo.trtllm", tensors, enable_empty_final_response=True)
        while not (result := answers.get(timeout=60)).get_response().parameters["triton_final_response"].bool_param:
            deltas.append(result.as_numpy("text_output").flat[0].decode())
        client.stop_stream()
    assert len(deltas) > 3
    assert "".join(deltas) == ANSWER


def test_tritonclient_grpc(server: dict[str, str]) -> None:
    """A decoupled model's clients stream, whether they want deltas or not."""
    answers: queue.Queue[Any] = queue.Queue()
    with triton_grpc.InferenceServerClient(server["grpc"]) as client:
        assert client.is_model_ready("demo")
        client.start_stream(lambda result, error: answers.put(error or result.as_numpy("text_output")))
        client.async_stream_infer("demo", inputs(triton_grpc, QUESTION, exclude_input_in_output=True))
        assert answers.get(timeout=60)[0].decode() == ANSWER
        client.stop_stream()


async def test_tritonclient_grpc_aio(server: dict[str, str]) -> None:
    """Several at once, on one stream."""

    async def requests() -> Any:
        for question in QUESTIONS:
            yield {
                "model_name": "demo",
                "inputs": inputs(triton_grpc_aio, question, exclude_input_in_output=True),
                "request_id": question,
            }

    got = {}
    async with triton_grpc_aio.InferenceServerClient(server["grpc"]) as client:
        async for result, error in client.stream_infer(requests()):
            assert error is None
            got[result.get_response().id] = result.as_numpy("text_output")[0].decode()
            if len(got) == len(QUESTIONS):
                break
    assert got == QUESTIONS


async def test_tritonclient_http(server: dict[str, str], router: str) -> None:
    """Sync and aio read what Triton has been told of the model by the backend. `infer` over HTTP is not for decoupled
    models, says Triton; the router in front answers it."""
    with contextlib.closing(triton_http.InferenceServerClient(server["http"])) as client:
        names = {tensor["name"] for tensor in client.get_model_metadata("demo")["inputs"]}
        assert {"text_input", "stream", "sampling_parameters", "exclude_input_in_output", "input_ids"} <= names
        with pytest.raises(InferenceServerException, match="decoupled"):
            client.infer("demo", inputs(triton_http, QUESTION))
    async with triton_http_aio.InferenceServerClient(server["http"]) as client:
        config = await client.get_model_config("demo")
    assert config["model_transaction_policy"] == {"decoupled": True}
    assert config["backend"] == "dynamo_llm"

    address = router.removeprefix("http://")
    with contextlib.closing(triton_http.InferenceServerClient(address)) as client:
        got = client.infer("demo", inputs(triton_http, QUESTION, exclude_input_in_output=True))
        assert got.as_numpy("text_output")[0].decode() == ANSWER
    async with triton_http_aio.InferenceServerClient(address) as client:
        got = await client.infer("demo", inputs(triton_http_aio, QUESTION, exclude_input_in_output=True))
        assert got.as_numpy("text_output")[0].decode() == ANSWER


def test_the_router_in_front(server: dict[str, str], router: str) -> None:
    """OpenAI's client and KServe's, with right answers; the router knows the host, and reuses the prefix."""
    with openai.OpenAI(base_url=f"{router}/v1", api_key="none", max_retries=0, timeout=60) as client:
        for question, answer in QUESTIONS.items():
            messages: Any = [{"role": "user", "content": question}]
            got = client.chat.completions.create(model="demo", messages=messages, temperature=0)
            assert got.choices[0].message.content == answer
        system: Any = [{"role": "system", "content": "Answer clearly. " * 40}, {"role": "user", "content": QUESTION}]
        for _ in range(2):
            got = client.chat.completions.create(model="demo", messages=system, temperature=0)
        assert got.usage is not None
        assert got.usage.prompt_tokens_details is not None
        assert (got.usage.prompt_tokens_details.cached_tokens or 0) > 100
    body = {"text_input": prompt(QUESTION), "exclude_input_in_output": True, **OPTIONS}
    assert json.loads(post(f"{router}/v2/models/demo/generate", body))["text_output"] == ANSWER


async def test_many_at_once_through_the_router(router: str) -> None:
    """Each gets its own answer."""
    async with openai.AsyncOpenAI(base_url=f"{router}/v1", api_key="none", max_retries=0, timeout=60) as client:

        async def ask(number: int) -> str | None:
            messages: Any = [{"role": "user", "content": f"What is {number} + 7?"}]
            got = await client.chat.completions.create(model="demo", messages=messages, temperature=0)
            return got.choices[0].message.content

        answers = await asyncio.gather(*(ask(number) for number in range(10, 42)))
    assert answers == [f"{number} + 7 = {number + 7}." for number in range(10, 42)]
