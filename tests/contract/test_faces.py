"""One client, two servers: the router's KServe face and a worker's own public model, in front of the same engine."""

import asyncio
import json
import queue
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import numpy as np
import pytest
import tritonclient.grpc as triton
from fleet import Fleet, generation_over, models_of
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from dynamo_llm import public_model
from kvstore.cards import InstanceCard
from router.kserve import face
from router.kserve import request as kserve_request
from router.kserve.grpc import KServeGrpc
from router.metrics import Metrics


@pytest.fixture
async def servers(rig: Any, worker: InstanceCard) -> AsyncIterator[tuple[str, str]]:
    """gRPC addresses of a router in front of one worker, and of that worker."""
    fleet = Fleet()
    fleet.connections = [await rig.connect(worker, "face", fleet.on_change)]
    models, generation = models_of(*fleet.connections), generation_over(fleet)
    async with KServeGrpc(models, generation, Metrics(), lambda _: True, "127.0.0.1", 0) as router:
        yield f"127.0.0.1:{router.port}", worker.grpc_address


# --- what is announced ----------------------------------------------------------------------------------------------


async def test_metadata_agrees(servers: tuple[str, str]) -> None:
    """What a router has, a worker has by the same names and types, and the inputs by the same shapes; a worker has more
    of both, and gives one element for each answer where a router gives one."""
    router, worker = [await asyncio.to_thread(_metadata, address) for address in servers]
    assert {name: worker["inputs"].get(name) for name in router["inputs"]} == router["inputs"]
    for name, (datatype, _) in router["outputs"].items():
        assert worker["outputs"][name][0] == datatype


async def test_configs_agree(servers: tuple[str, str]) -> None:
    """Decoupled, unbatched, every input optional."""
    configs = [await asyncio.to_thread(_config, address) for address in servers]
    assert all(config.model_transaction_policy.decoupled for config in configs)
    assert [config.max_batch_size for config in configs] == [0, 0]
    assert all(tensor.optional for config in configs for tensor in config.input)


def test_sampling_parameters_agree() -> None:
    """The same names beside the engine's own, with the same defaults, but for the timeout, which Triton itself keeps
    on a worker."""
    router, worker = (_defaults(options) for options in (kserve_request.Options, public_model.Options))
    router.pop("timeout")
    assert router == worker
    assert public_model.DEFAULT_MAX_TOKENS == face.DEFAULT_MAX_TOKENS == 16


def _metadata(address: str) -> dict[str, dict[str, tuple[str, list[int]]]]:
    with triton.InferenceServerClient(address) as client:
        metadata = client.get_model_metadata("demo")
    return {
        kind: {tensor.name: (tensor.datatype, list(tensor.shape)) for tensor in getattr(metadata, kind)}
        for kind in ("inputs", "outputs")
    }


def _config(address: str) -> Any:
    with triton.InferenceServerClient(address) as client:
        return client.get_model_config("demo").config


def _defaults(options: type[msgspec.Struct]) -> dict[str, Any]:
    return {field.name: field.default for field in msgspec.structs.fields(options)}


# --- what is answered -----------------------------------------------------------------------------------------------

Inputs = dict[str, tuple[str, list[Any]]]
TEXT: Inputs = {"text_input": ("BYTES", ["The capital of France"])}
IDS: Inputs = {"input_ids": ("INT32", [300, 301, 302])}
FLAGS: Inputs = {
    f"return_{name}": ("BOOL", [True]) for name in ("finish_reason", "num_input_tokens", "num_output_tokens")
}


def _sampling(**values: Any) -> Inputs:
    return {"sampling_parameters": ("BYTES", [json.dumps(values)])}


def _ask(address: str, inputs: Inputs, parameters: dict[str, Any]) -> list[Any]:
    """All responses of one request on a stream. Raises `InferenceServerException`."""
    tensors = []
    for name, (datatype, values) in inputs.items():
        array = np.array([v.encode() if isinstance(v, str) else v for v in values], triton_to_np_dtype(datatype))
        tensors.append(triton.InferInput(name, [len(values)], datatype))
        tensors[-1].set_data_from_numpy(array)
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    responses = []
    with triton.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer("demo", tensors, parameters=parameters, enable_empty_final_response=True)
        final = False
        while not final:
            result, error = answers.get(timeout=20)
            if error is not None:
                raise error
            response = result.get_response()
            final = response.parameters["triton_final_response"].bool_param
            if response.outputs:
                responses.append(result)
    return responses


def _sum_up(responses: list[Any]) -> dict[str, Any]:
    """What a client makes of them. How many there are is each server's own business."""
    arrays = [
        {output.name: response.as_numpy(output.name) for output in response.get_response().outputs}
        for response in responses
    ]
    summed: dict[str, Any] = {"text_output": b"".join(part["text_output"][0] for part in arrays)}
    if "output_ids" in arrays[0]:
        summed["output_ids"] = np.concatenate([part["output_ids"] for part in arrays]).tolist()
    if "num_output_tokens" in arrays[0]:
        summed["num_output_tokens"] = sum(int(part["num_output_tokens"][0]) for part in arrays)
        summed["num_input_tokens"] = {int(part["num_input_tokens"][0]) for part in arrays}
    if "finish_reason" in arrays[0]:
        summed["finish_reasons"] = {bytes(part["finish_reason"][0]) for part in arrays[:-1]}
        summed["finish_reason"] = bytes(arrays[-1]["finish_reason"][0])
    return summed


ALIKE: dict[str, tuple[Inputs, dict[str, Any]]] = {
    "text only": (TEXT, {}),
    "every count": (TEXT | FLAGS, {}),
    "without the prompt": (TEXT | {"exclude_input_in_output": ("BOOL", [True])}, {}),
    "with the prompt": (TEXT | {"exclude_input_in_output": ("BOOL", [False])}, {}),
    "streamed": (TEXT | FLAGS | {"stream": ("BOOL", [True])}, {}),
    "ids": (IDS, {}),
    "ids streamed": (IDS | FLAGS | {"stream": ("BOOL", [True])}, {}),
    "max_tokens as an input": (IDS | {"max_tokens": ("INT32", [5])}, {}),
    "max_tokens as a parameter": (IDS, {"max_tokens": "5"}),
    "max_tokens in the JSON": (IDS | _sampling(max_tokens="5"), {"max_tokens": 7}),
    "an input wins over the JSON": (IDS | _sampling(max_tokens=7) | {"max_tokens": ("INT32", [5])}, {}),
    "nulls": (IDS | _sampling(temperature=None, stop=None, seed=None, top_k=-1), {}),
    "vLLM's parameters": (
        TEXT | _sampling(temperature=0.5, top_p=0.9, top_k=5, seed=3, stop=["zzz"], ignore_eos=True, min_tokens=2),
        {},
    ),
    "no special tokens": (TEXT | FLAGS | _sampling(add_special_tokens=False), {}),
    "a tenant of its own": (TEXT | _sampling(cache_salt="tenant", lora_name="", priority=1), {}),
    "empty stop words": (TEXT | {"stop_words": ("BYTES", ["", ""])}, {}),
    "stop words win over the JSON": (
        TEXT | FLAGS | {"stop_words": ("BYTES", ["a", "e", "i", "o", "u"])} | _sampling(stop=" ", max_tokens=200),
        {},
    ),
    "stop words that are kept": (
        TEXT
        | {"stop_words": ("BYTES", ["a", "e", "i", "o", "u"])}
        | _sampling(include_stop_str_in_output=True, max_tokens=200),
        {},
    ),
    "single sampling inputs": (
        IDS
        | {"temperature": ("FP32", [0.5]), "top_k": ("INT32", [3]), "seed": ("UINT64", [2**64 - 1])}
        | {"ignore_eos": ("BOOL", [True]), "repetition_penalty": ("FP32", [1.5])},
        {},
    ),
}


@pytest.mark.parametrize(("inputs", "parameters"), ALIKE.values(), ids=ALIKE)
async def test_answers_agree(servers: tuple[str, str], inputs: Inputs, parameters: dict[str, Any]) -> None:
    """The same request gets the same text, tokens, counts and reasons from both."""
    router, worker = [_sum_up(await asyncio.to_thread(_ask, address, inputs, parameters)) for address in servers]
    if "text_input" in inputs:  # a worker answers with ids in any case
        assert worker.pop("output_ids")
    assert router == worker


async def test_sixteen_tokens_unless_told_otherwise(servers: tuple[str, str]) -> None:
    """As in vLLM, and by both."""
    for address in servers:
        summed = _sum_up(await asyncio.to_thread(_ask, address, IDS | FLAGS, {}))
        assert summed["output_ids"] == list(range(303, 319))
        assert (summed["finish_reason"], summed["num_output_tokens"]) == (b"length", 16)


WRONG: dict[str, tuple[Inputs, dict[str, Any], str]] = {
    "no prompt": ({"max_tokens": ("INT32", [3])}, {}, "input_ids"),
    "two prompts": (TEXT | IDS, {}, "input_ids"),
    "a negative id": ({"input_ids": ("INT32", [1, -1])}, {}, "negative"),
    "too long": ({"input_ids": ("INT32", [1] * 2000)}, {}, "1024"),
    "unknown parameter": (TEXT, {"temprature": 1}, "did you mean 'temperature'"),
    "out of range": (TEXT | _sampling(temperature=-1), {}, "temperature"),
    "no number": (TEXT, {"temperature": "hot"}, "temperature"),
    "no JSON": (TEXT | {"sampling_parameters": ("BYTES", ["{"])}, {}, "sampling_parameters"),
    "no answers": (TEXT | _sampling(n=0), {}, r"\bn\b"),
    "no tokens": (TEXT | {"max_tokens": ("INT32", [0])}, {}, "max_tokens"),
    "a seed of 70 bits": (TEXT | {"sampling_parameters": ("BYTES", [f'{{"seed": {2**70}}}'])}, {}, "seed"),
    "a prompt in a stream": (
        TEXT | {"stream": ("BOOL", [True]), "exclude_input_in_output": ("BOOL", [False])},
        {},
        "exclude_input_in_output",
    ),
}


@pytest.mark.parametrize(("inputs", "parameters", "message"), WRONG.values(), ids=WRONG)
async def test_both_refuse(servers: tuple[str, str], inputs: Inputs, parameters: dict[str, Any], message: str) -> None:
    """What is wrong for one is wrong for the other, and each says what it is about."""
    for address in servers:
        with pytest.raises(InferenceServerException, match=message):
            await asyncio.to_thread(_ask, address, inputs, parameters)
