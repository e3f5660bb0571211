"""Clients as users of vllm_backend and tensorrtllm_backend write them, on the real PyTriton server."""

import json
import queue
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.grpc.aio as aioclient
from scripted_engine import Events, ScriptedEngine
from tritonclient.utils import np_to_triton_dtype

from dynamo_llm.hosts.base import PublicModels
from dynamo_llm.hosts.pytriton import PyTritonHost
from dynamo_llm.metrics import Metrics
from dynamo_llm.service import Limits, Service
from kvstore.text import Tokenizer

MODEL_FOLDER = Path(__file__).parents[2] / "model_repository/demo/1/model"
TOKENIZER = Tokenizer.from_files({"tokenizer.json": (MODEL_FOLDER / "tokenizer.json").read_bytes()})


class Rig:
    """A server whose model itself speaks tensorrtllm_backend's dialect, so that vLLM's clients ask its companion."""

    def __init__(self, folder: Path) -> None:
        self.engine = ScriptedEngine(step_s=0.002)
        self.service = Service(
            self.engine, instance="0" * 16, epoch=7, events=Events(), metrics=Metrics("demo"), limits=Limits()
        )
        self.service.start()
        public = PublicModels("demo", [self.service], TOKENIZER, "tensorrtllm")
        self.host = PyTritonHost({"demo": self.service}, public, folder=folder)
        self.host.start()

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.host.grpc_port}"

    def post(self, path: str, **body: Any) -> tuple[int, str]:
        url = f"http://127.0.0.1:{self.host.http_port}/v2/models/{path}"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    rig = Rig(tmp_path_factory.mktemp("t"))
    yield rig
    rig.host.stop()
    rig.engine.close()


def _continuation(prompt: str, count: int) -> str:
    last = int(np.frombuffer(TOKENIZER.encode(prompt), "<u4")[-1])
    return TOKENIZER.decode(range(last + 1, last + 1 + count))


# --- vllm_backend ---------------------------------------------------------------------------------------------------

SAMPLING = {"temperature": "0.1", "top_p": "0.95", "max_tokens": "10"}
PROMPTS = ["Hello", "The capital of France"]


async def _requests(streaming: bool) -> AsyncIterator[dict[str, Any]]:
    """Tensors of one element, the sampling parameters as text and as the request's own, like its sample client."""
    for number, prompt in enumerate(PROMPTS):
        given = {
            "text_input": np.array([prompt.encode()], np.object_),
            "stream": np.array([streaming]),
            "sampling_parameters": np.array([json.dumps(SAMPLING).encode()], np.object_),
        }
        yield {
            "model_name": "demo.vllm",
            "inputs": _tensors(aioclient, given),
            "outputs": [aioclient.InferRequestedOutput("text_output")],
            "request_id": str(number),
            "parameters": SAMPLING,
        }


def _tensors(client: Any, given: dict[str, Any]) -> list[Any]:
    tensors = []
    for name, array in given.items():
        tensors.append(client.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        tensors[-1].set_data_from_numpy(array)
    return tensors


@pytest.mark.parametrize("streaming", [False, True])
async def test_an_aio_client_of_vllm_backend(rig: Rig, streaming: bool) -> None:
    """Several prompts on one stream, told apart by their request ids."""
    texts = {str(number): "" for number in range(len(PROMPTS))}
    async with aioclient.InferenceServerClient(rig.grpc) as client:
        async for result, error in client.stream_infer(_requests(streaming)):
            assert error is None
            for text in result.as_numpy("text_output"):
                texts[result.get_response().id] += text.decode()
    prefixes = ["" if streaming else prompt for prompt in PROMPTS]
    assert list(texts.values()) == [
        prefix + _continuation(prompt, 10) for prefix, prompt in zip(prefixes, PROMPTS, strict=True)
    ]


def test_an_http_client_of_vllm_backend(rig: Rig) -> None:
    """`generate` with parameters beside the inputs, and `generate_stream`."""
    parameters = {"temperature": 0, "max_tokens": 5}
    status, text = rig.post("demo.vllm/generate", text_input="Hello", id="x", parameters=parameters)
    assert (status, json.loads(text)["text_output"]) == (200, "Hello" + _continuation("Hello", 5))
    status, text = rig.post("demo.vllm/generate_stream", text_input="Hello", stream=True, parameters=parameters)
    pieces = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]
    assert "".join(piece["text_output"] for piece in pieces) == _continuation("Hello", 5)
    assert len(pieces) == 5


# --- tensorrtllm_backend --------------------------------------------------------------------------------------------


def _stream(rig: Rig, *requests: dict[str, Any], outputs: tuple[str, ...] = (), request_id: str = "") -> list[Any]:
    """All results of a stream that the client closes behind its requests, as its sample clients do."""
    results: queue.Queue[Any] = queue.Queue()
    with grpcclient.InferenceServerClient(rig.grpc) as client:
        client.start_stream(lambda result, error: results.put(error or result))
        for request in requests:
            client.async_stream_infer(
                "demo",
                _tensors(grpcclient, request),
                outputs=[grpcclient.InferRequestedOutput(name) for name in outputs] or None,
                request_id=request_id,
            )
        client.stop_stream()
    return list(results.queue)


def _ensemble(*prompts: str, streaming: bool) -> dict[str, Any]:
    """What the end-to-end client sends for a batch of prompts, at its defaults."""
    one = np.ones((len(prompts), 1))
    return {
        "text_input": np.array([[prompt] for prompt in prompts]).astype(object),
        "max_tokens": (one * 8).astype(np.int32),
        "stream": np.full(one.shape, streaming),
        "beam_width": one.astype(np.int32),
        "temperature": one.astype(np.float32),
        "num_return_sequences": one.astype(np.int32),
        "repetition_penalty": one.astype(np.float32),
        "return_log_probs": np.full(one.shape, True),
        "return_context_logits": np.full(one.shape, False),
        "end_id": (one * 2).astype(np.int32),
        "pad_id": (one * 2).astype(np.int32),
        "exclude_input_in_output": np.full(one.shape, False),
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_an_end_to_end_client_of_tensorrtllm_backend(rig: Rig, streaming: bool) -> None:
    """A batch of texts; each response is of one of them and has its log probabilities."""
    names = ("text_output", "cum_log_probs", "output_log_probs", "batch_index")
    results = _stream(rig, _ensemble(*PROMPTS, streaming=streaming), outputs=names)
    texts = ["", ""]
    for result in results:
        index = result.as_numpy("batch_index")[0][0]
        texts[index] += result.as_numpy("text_output")[0].decode()
        assert result.as_numpy("output_log_probs").shape == (1, 1, 1 if streaming else 8)
        assert result.as_numpy("cum_log_probs").shape == (1, 1)
    assert len(results) == (16 if streaming else 2)
    assert texts == [("" if streaming else prompt) + _continuation(prompt, 8) for prompt in PROMPTS]


def _core(streaming: bool, output_len: int = 16) -> dict[str, Any]:
    """What the client of the core model sends."""
    return {
        "input_ids": np.array([[300, 301]], np.int32),
        "input_lengths": np.array([[2]], np.int32),
        "request_output_len": np.array([[output_len]], np.int32),
        "beam_width": np.array([[1]], np.int32),
        "temperature": np.array([[1.0]], np.float32),
        "streaming": np.array([[streaming]]),
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_a_core_client_of_tensorrtllm_backend(rig: Rig, streaming: bool) -> None:
    """Ids in, ids out, by batch and beam; the prompt's are in the answer that is not streamed."""
    results = _stream(rig, _core(streaming))
    ids = [token for result in results for token in result.as_numpy("output_ids")[0][0].tolist()]
    assert ids == list(range(302 if streaming else 300, 318))


def test_a_core_client_stops_its_request(rig: Rig) -> None:
    """By the same request id on the same stream, with a prompt that means nothing; the stop gets an empty response."""
    stop = {
        "input_ids": np.zeros([1, 1], np.int32),
        "input_lengths": np.zeros([1, 1], np.int32),
        "request_output_len": np.array([[0]], np.int32),
        "stop": np.array([[True]]),
    }
    results = _stream(rig, _core(True, output_len=900), stop, request_id="12345")
    outputs = [result.as_numpy("output_ids") for result in results]
    assert len([output for output in outputs if output is None]) == 1
    assert len(outputs) < 800
    assert rig.service.in_flight == 0


def test_an_http_client_of_tensorrtllm_backend(rig: Rig) -> None:
    """The calls of its documentation: empty word lists, `generate` and `generate_stream`."""
    body = {"text_input": "Hello", "max_tokens": 5, "bad_words": "", "stop_words": ""}
    status, text = rig.post("demo/generate", **body)
    assert (status, json.loads(text)["text_output"]) == (200, "Hello" + _continuation("Hello", 5))
    status, text = rig.post("demo/generate_stream", **body, stream=True)
    pieces = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]
    assert (status, "".join(piece["text_output"] for piece in pieces)) == (200, _continuation("Hello", 5))


@pytest.mark.parametrize("model", ["demo", "demo.vllm"])
@pytest.mark.parametrize("call", ["generate", "generate_stream"])
def test_an_error_before_the_first_response_is_the_protocols(rig: Rig, model: str, call: str) -> None:
    """A 400 with the reason, and no traceback."""
    status, text = rig.post(f"{model}/{call}", text_input="Hi", beam_width=4)
    assert status == 400
    assert "beam_width must be 1" in text
    assert "Traceback" not in text


def test_the_configuration_says_how_each_is_asked(rig: Rig) -> None:
    """By it, tools tell whether a batch goes in front; both are decoupled."""
    with grpcclient.InferenceServerClient(rig.grpc) as client:
        configs = [client.get_model_config(name).config for name in ("demo", "demo.vllm")]
        assert list(client.get_model_metadata("demo").inputs[0].shape) == [-1, 1]
    assert [config.max_batch_size for config in configs] == [64, 0]
    assert all(config.model_transaction_policy.decoupled for config in configs)
