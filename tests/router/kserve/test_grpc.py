"""KServe v2 over gRPC, asked by the real tritonclient."""

import asyncio
import json
import queue
import socket

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from router.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    Unavailable,
    WorkerFailed,
)
from router.kserve.grpc import KServeGrpc, PortBusy
from router.metrics import Metrics
from router.models import Models

PROMPT = "The capital of France is Paris."


def tensor(name, values, datatype, shape=None):
    dtype = {"BYTES": np.object_, "BOOL": bool, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32}[datatype]
    array = np.array([v.encode() if isinstance(v, str) else v for v in values], dtype)
    array = array.reshape(shape or array.shape)
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def prompt(text=PROMPT, stream=None, **flags):
    inputs = [tensor("text_input", [text], "BYTES")]
    if stream is not None:
        inputs.append(tensor("stream", [stream], "BOOL"))
    return inputs + [tensor(name, [value], "BOOL") for name, value in flags.items()]


def parameters(result):
    return {k: getattr(v, v.WhichOneof("parameter_choice")) for k, v in result.get_response().parameters.items()}


def text_of(result):
    return result.as_numpy("text_output")[0].decode()


@pytest.fixture
def client(faces):
    with triton.InferenceServerClient(faces.grpc) as made:
        yield made


class Stream:
    """One ModelStreamInfer call, its answers in a queue."""

    def __init__(self, client):
        self.answers = queue.Queue()
        self.client = client
        client.start_stream(lambda result, error: self.answers.put(error or result))

    def ask(self, inputs, **options):
        self.client.async_stream_infer("demo", inputs, **options)

    def next(self):
        return self.answers.get(timeout=20)

    def until_final(self):
        """All answers up to the final one of one request."""
        results = [self.next()]
        while not isinstance(results[-1], Exception) and not parameters(results[-1])["triton_final_response"]:
            results.append(self.next())
        return results


@pytest.fixture
def stream(client):
    made = Stream(client)
    yield made
    client.stop_stream(cancel_requests=True)


def test_health_and_server_metadata(client, faces):
    """The health RPCs answer, and ready says no for models that are not there."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("demo")
    assert client.is_model_ready("demo", "1")
    assert not client.is_model_ready("demo", "2")
    assert not client.is_model_ready("nothing")
    assert client.get_server_metadata().name == "dynamo-llm"


def test_known_is_not_ready(client, faces):
    """A model whose workers are registered but take nothing yet is not ready, nor is a server without another one."""
    faces.serving = {"org/demo"}
    assert client.is_server_ready()
    assert not client.is_model_ready("demo")
    assert client.is_model_ready("org/demo")
    faces.serving = set()
    assert not client.is_server_ready()
    assert client.is_server_live()


def test_model_metadata_and_config_agree(client):
    """Metadata and config name the same tensors, and the config is a decoupled model without batching."""
    metadata = client.get_model_metadata("demo")
    config = client.get_model_config("demo").config
    assert list(metadata.versions) == ["1"]
    assert [t.name for t in metadata.inputs] == [t.name for t in config.input]
    assert [t.name for t in metadata.outputs] == [t.name for t in config.output]
    assert config.input[0].data_type == model_config_pb2.TYPE_STRING
    assert list(config.input[0].dims) == [1]
    assert config.model_transaction_policy.decoupled
    assert config.max_batch_size == 0
    assert config.parameters["block_size"].string_value == "16"


def test_sixteen_tokens_unless_told_otherwise(client, stream, generator):
    """As in vLLM: a client that names no `max_tokens` gets 16, and an explicit null lifts the limit."""
    client.infer("demo", prompt())
    stream.ask(prompt())
    stream.until_final()
    for document in ('{"temperature": null}', '{"max_tokens": null}'):
        client.infer("demo", [*prompt(), tensor("sampling_parameters", [document], "BYTES")])
    assert [request.sampling.max_tokens for request in generator.requests] == [16, 16, 16, None]
    assert generator.requests[2].sampling.temperature == 1.0


def test_infer_prepends_the_prompt(client, generator):
    """Without streaming the prompt comes first, as in vllm_backend, and parameters say where the request went."""
    result = client.infer("demo", prompt(), request_id="r1")
    assert text_of(result) == PROMPT + PROMPT
    response = result.get_response()
    assert (response.id, response.model_name, response.model_version) == ("r1", "demo", "1")
    assert [o.name for o in response.outputs] == ["text_output"]
    assert parameters(result) == {
        "instance": "00000000000000aa",
        "prompt_blocks": len(generator.requests[0].token_ids) // 64,
        "reused_blocks": len(generator.requests[0].token_ids) // 128,
        "cached_tokens": 16 * (len(generator.requests[0].token_ids) // 128),
        "ttft_ms": 1.5,
    }
    assert generator.requests[0].request_id == "r1"


def test_flags_ask_for_outputs(client, tokenizer):
    """Each return_ flag adds its output, in vllm_backend's types."""
    flags = ["finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens"]
    inputs = prompt(exclude_input_in_output=True, **{f"return_{flag}": True for flag in flags})
    inputs.append(tensor("sampling_parameters", ['{"max_tokens": 3, "logprobs": 2, "temperature": "0.5"}'], "BYTES"))
    result = client.infer("demo", inputs)
    ids = np.frombuffer(tokenizer.encode(PROMPT), "<u4")
    assert {o.name for o in result.get_response().outputs} == {"text_output", *flags}
    assert result.as_numpy("finish_reason")[0] == b"length"
    assert result.as_numpy("cumulative_logprob")[0] == pytest.approx(-1.5)
    assert result.as_numpy("num_input_tokens")[0] == len(ids)
    assert result.as_numpy("num_output_tokens")[0] == 3
    positions = json.loads(result.as_numpy("logprobs")[0])
    assert len(positions) == 3
    assert {entry["rank"] for entry in positions[0].values()} == {1, 2}


def test_requested_outputs_only(client):
    """An `outputs` list decides alone what comes back."""
    wanted = [triton.InferRequestedOutput("num_output_tokens"), triton.InferRequestedOutput("output_ids")]
    result = client.infer("demo", prompt(return_finish_reason=True), outputs=wanted)
    assert {o.name for o in result.get_response().outputs} == {"num_output_tokens", "output_ids"}
    assert result.as_numpy("output_ids").dtype == np.int32
    assert len(result.as_numpy("output_ids")) == result.as_numpy("num_output_tokens")[0]


@pytest.mark.parametrize("datatype", ["INT32", "INT64"])
def test_input_ids_instead_of_text(client, generator, tokenizer, datatype):
    """Token ids go to the router as they are, and ids come back beside the text."""
    ids = np.frombuffer(tokenizer.encode("Paris."), "<u4").tolist()
    result = client.infer("demo", [tensor("input_ids", ids, datatype)])
    assert np.frombuffer(generator.requests[0].token_ids, "<u4").tolist() == ids
    assert text_of(result) == "Paris."
    assert result.as_numpy("output_ids").tolist() == [i for i in ids if i not in tokenizer.special_ids]


def test_tensorrtllm_dialect(client, generator):
    """Sampling inputs shaped [1, 1], as Triton's OpenAI frontend sends them, set the sampling parameters."""
    inputs = [tensor("text_input", [PROMPT], "BYTES", (1, 1)), tensor("max_tokens", [2], "INT32", (1, 1))]
    inputs += [tensor("temperature", [0.5], "FP32", (1, 1)), tensor("top_k", [7], "INT32", (1, 1))]
    inputs += [tensor("stop_words", ["Rome", "Oslo"], "BYTES", (1, 2)), tensor("end_id", [5], "INT32", (1, 1))]
    inputs += [tensor("bad_words", [""], "BYTES", (1, 1)), tensor("pad_id", [1], "INT32", (1, 1))]
    client.infer("demo", inputs)
    request = generator.requests[0]
    assert (request.sampling.max_tokens, request.sampling.temperature, request.sampling.top_k) == (2, 0.5, 7)
    assert request.sampling.stop_token_ids == (5,)
    assert request.stop == ("Rome", "Oslo")


def test_request_parameters_are_sampling_parameters(client, generator):
    """Request parameters set the sampling where no sampling_parameters input does."""
    client.infer("demo", prompt(), parameters={"max_tokens": 4, "temperature": "0.25", "stop": "!"}, priority=3)
    request = generator.requests[0]
    assert (request.sampling.max_tokens, request.sampling.temperature, request.stop) == (4, 0.25, ("!",))
    assert request.priority == 3


def test_typed_contents_instead_of_raw(faces):
    """Tensors may come in `contents` fields too, as hand-written clients send them."""
    request = service_pb2.ModelInferRequest(model_name="demo")
    text = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    text.contents.bytes_contents.append(PROMPT.encode())
    most = request.inputs.add(name="max_tokens", datatype="INT32", shape=[1])
    most.contents.int_contents.append(1)
    with grpc.insecure_channel(faces.grpc) as channel:
        response = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    assert PROMPT.encode() in response.raw_output_contents[0]


def test_stream_sends_deltas(stream):
    """A stream carries the answer without the prompt, placement first, usage with the final response."""
    stream.ask(prompt(stream=True, return_finish_reason=True), request_id="s1")
    results = stream.until_final()
    assert "".join(text_of(r) for r in results) == PROMPT
    assert {r.get_response().id for r in results} == {"s1"}
    assert parameters(results[0])["instance"] == "00000000000000aa"
    assert parameters(results[-1])["ttft_ms"] == 1.5
    reasons = [r.as_numpy("finish_reason")[0] for r in results]
    assert reasons[-1] == b"stop"
    assert set(reasons[:-1]) <= {b"None"}


def test_empty_final_response(stream):
    """With triton_enable_empty_final_response the last response has no outputs and says that it is final."""
    stream.ask(prompt(stream=True), enable_empty_final_response=True)
    *content, final = stream.until_final()
    assert "".join(text_of(r) for r in content) == PROMPT
    assert not final.get_response().outputs
    assert {"instance", "prompt_blocks", "reused_blocks", "cached_tokens", "ttft_ms"} < set(parameters(final))


def test_stream_without_streaming(stream):
    """On a stream, a request that does not ask for streaming gets one response with the prompt in front."""
    stream.ask(prompt())
    (only,) = stream.until_final()
    assert text_of(only) == PROMPT + PROMPT


def test_two_requests_on_one_stream(stream, generator):
    """Requests on one stream run side by side: one that hangs does not hold the next one up."""
    generator.hold_after, generator.hold_only = 3, {"slow"}
    stream.ask(prompt("One two three four five six", stream=True), request_id="slow")
    first = stream.next()
    assert first.get_response().id == "slow"
    stream.ask(prompt("Seven eight nine", stream=True), request_id="quick")
    answers = []
    while not answers or not parameters(answers[-1])["triton_final_response"]:
        answers.append(stream.next())
    quick = [r for r in answers if r.get_response().id == "quick"]
    assert "".join(text_of(r) for r in quick) == "Seven eight nine"
    assert generator.finished == ["quick"]


def test_many_requests_on_one_stream(stream):
    """Fifty requests on one stream all come back whole."""
    texts = {f"r{i}": f"number {i} of fifty" for i in range(50)}
    for request_id, text in texts.items():
        stream.ask(prompt(text, stream=True), request_id=request_id)
    got = dict.fromkeys(texts, "")
    finals = 0
    while finals < len(texts):
        result = stream.next()
        got[result.get_response().id] += text_of(result)
        finals += parameters(result)["triton_final_response"]
    assert got == texts


def test_error_in_band(stream, generator):
    """A request that fails ends with error_message, and the stream serves on."""
    generator.error, generator.fail_after = WorkerFailed("all workers are gone"), 2
    stream.ask(prompt(stream=True), request_id="bad")
    *content, error = stream.until_final()
    assert isinstance(error, InferenceServerException)
    assert error.message() == "all workers are gone"
    assert content
    stream.ask([tensor("text_input", ["a", "b"], "BYTES")])
    assert "text_input" in stream.next().message()
    generator.error = None
    stream.ask(prompt())
    assert text_of(stream.next()) == PROMPT + PROMPT


def test_error_in_band_carries_the_id(faces):
    """The in-band error names the request it belongs to."""
    request = service_pb2.ModelInferRequest(model_name="nothing", id="x7")
    with grpc.insecure_channel(faces.grpc) as channel:
        (answer,) = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([request]))
    assert answer.error_message == "Request for unknown model: 'nothing' is not found"
    assert answer.infer_response.id == "x7"


def test_error_as_status_when_asked(faces):
    """With the metadata triton_grpc_error an error ends the stream with its status instead."""
    request = service_pb2.ModelInferRequest(model_name="nothing")
    with grpc.insecure_channel(faces.grpc) as channel:
        call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(
            iter([request]), metadata=[("triton_grpc_error", "true")]
        )
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_cancelled_stream_cancels_its_requests(client, faces, generator, until):
    """A client that drops its stream cancels everything it had in flight on it, and each of it is counted."""
    generator.hold_after = 2
    stream = Stream(client)
    for name in ("a", "b", "c"):
        stream.ask(prompt(stream=True), request_id=name)
    until(lambda: len(generator.requests) == 3)
    client.stop_stream(cancel_requests=True)
    until(lambda: sorted(generator.cancelled) == ["a", "b", "c"])
    until(lambda: faces.metrics.requests == {("kserve_grpc_stream", "demo", "CANCELLED"): 3})


def test_cancelled_infer_cancels_the_request(client, generator, until):
    """Cancelling a unary call reaches the generator."""
    generator.hold_after = 0
    call = client.async_infer("demo", prompt(), callback=lambda result, error: None, request_id="gone")
    until(lambda: generator.requests)
    call.cancel()
    until(lambda: generator.cancelled == ["gone"])


def test_client_deadline(client, generator, until):
    """A gRPC deadline ends the call with DEADLINE_EXCEEDED and cancels the request."""
    generator.hold_after = 0
    with pytest.raises(InferenceServerException, match=r"(?i)deadline"):
        client.infer("demo", prompt(), client_timeout=0.2, request_id="late")
    until(lambda: generator.cancelled == ["late"])


def test_request_timeout_parameter(client, generator, until):
    """Triton's timeout parameter, in microseconds, limits the answer on the router's side."""
    generator.hold_after = 0
    with pytest.raises(InferenceServerException) as caught:
        client.infer("demo", prompt(), timeout=50_000, request_id="late")
    assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    until(lambda: generator.cancelled == ["late"])


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidRequest("no"), "INVALID_ARGUMENT"),
        (ContextLengthExceeded("no"), "INVALID_ARGUMENT"),
        (Overloaded("no", retry_after_s=2), "RESOURCE_EXHAUSTED"),
        (Unavailable("no"), "UNAVAILABLE"),
        (DeadlineExceeded("no"), "DEADLINE_EXCEEDED"),
        (WorkerFailed("no"), "INTERNAL"),
        (ZeroDivisionError("secret"), "INTERNAL"),
    ],
)
def test_error_statuses(client, generator, faces, error, status):
    """Each error of the router has its gRPC status, and a fault of ours shows nothing of itself."""
    generator.error = error
    with pytest.raises(InferenceServerException) as caught:
        client.infer("demo", prompt())
    assert caught.value.status() == f"StatusCode.{status}"
    assert "secret" not in caught.value.message()
    assert faces.metrics.requests == {("kserve_grpc_infer", "demo", status): 1}


def test_unknown_model_and_version(client):
    """Both are NOT_FOUND, worded as Triton does."""
    for model, version, message in [
        ("nothing", "", "Request for unknown model: 'nothing' is not found"),
        ("demo", "7", "Request for unknown model: 'demo' version 7 is not found"),
    ]:
        for ask in (
            lambda m, v: client.infer(m, prompt(), model_version=v),
            lambda m, v: client.get_model_metadata(m, v),
            lambda m, v: client.get_model_config(m, v),
        ):
            with pytest.raises(InferenceServerException) as caught:
                ask(model, version)
            assert (caught.value.status(), caught.value.message()) == ("StatusCode.NOT_FOUND", message)


def test_unimplemented_rpcs(faces):
    """RPCs that are not served say so by name."""
    served = {"ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelConfig"}
    served |= {"ModelInfer", "ModelStreamInfer"}
    methods = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods
    with grpc.insecure_channel(faces.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for method in methods:
            if method.name not in served:
                with pytest.raises(grpc.RpcError) as caught:
                    getattr(stub, method.name)(getattr(service_pb2, method.input_type.name)())
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
                assert method.name in caught.value.details()


def test_stream_flag_on_unary_infer(client):
    """ModelInfer has one response, so a request that wants a stream is told where to go."""
    with pytest.raises(InferenceServerException, match="ModelStreamInfer"):
        client.infer("demo", prompt(stream=True))


async def test_aio_client_streams(faces):
    """The asyncio client streams two requests through one call."""

    async def requests():
        for request_id in ("a", "b"):
            yield {"model_name": "demo", "inputs": prompt(stream=True), "request_id": request_id}

    texts = {"a": "", "b": ""}
    async with triton_aio.InferenceServerClient(faces.grpc) as client:
        async for result, error in client.stream_infer(requests()):
            assert error is None
            texts[result.get_response().id] += text_of(result)
    assert texts == {"a": PROMPT, "b": PROMPT}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200), method=st.sampled_from(["ModelInfer", "ModelMetadata", "ModelConfig"]))
def test_random_messages(faces, data, method):
    """Whatever bytes come as a message, the client is told that they are wrong."""
    with grpc.insecure_channel(faces.grpc) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(data, timeout=10)
        assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["text_input", "input_ids", "stream", "stop_words", "temperature", "sampling_parameters"]),
    datatype=st.sampled_from(["BYTES", "INT32", "BOOL", "FP32", "FP16", ""]),
    shape=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 3), max_size=10),
    raw=st.binary(max_size=40),
)
def test_random_tensors_in_band(faces, name, datatype, shape, raw):
    """Tensors that do not fit are answered in band, by name where one is at fault, and the stream lives on."""
    request = service_pb2.ModelInferRequest(model_name="demo", raw_input_contents=[raw])
    request.inputs.add(name=name, datatype=datatype, shape=shape)
    again = service_pb2.ModelInferRequest(model_name="demo", id="again")
    with grpc.insecure_channel(faces.grpc) as channel:
        answers = list(service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([request, again])))
    by_id = {answer.infer_response.id: answer for answer in answers}
    assert "text_input" in by_id["again"].error_message
    if by_id[""].error_message:
        assert "input" in by_id[""].error_message or "sampling" in by_id[""].error_message


async def test_drain_lets_requests_finish(faces, tokenizer, generator):
    """Leaving the server ends idle streams at once, and waits for answers in flight."""
    go, arrived = asyncio.Event(), asyncio.Event()

    class Gated(type(generator)):
        async def generate(self, request, on_delta=None, on_placed=None):
            arrived.set()
            await go.wait()
            return await super().generate(request, on_delta, on_placed)

    server = KServeGrpc(faces.models, Gated(tokenizer), Metrics(), faces.is_ready, "127.0.0.1", 0)
    await server.__aenter__()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        idle, busy = stub.ModelStreamInfer(), stub.ModelStreamInfer()
        request = service_pb2.ModelInferRequest(model_name="demo")
        request.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"Paris")
        await idle.write(service_pb2.ModelInferRequest(model_name="nothing"))
        assert (await idle.read()).error_message
        await busy.write(service_pb2.ModelInferRequest(model_name="nothing"))
        assert (await busy.read()).error_message
        await busy.write(request)
        await asyncio.wait_for(arrived.wait(), 10)
        leaving = asyncio.create_task(server.__aexit__())
        assert await idle.read() is grpc.aio.EOF
        assert not leaving.done()
        go.set()
        assert (await busy.read()).infer_response.parameters["triton_final_response"].bool_param
        assert await busy.read() is grpc.aio.EOF
        await leaving


async def test_busy_port(generator):
    """A port that somebody else has is one clear error."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortBusy, match=f"127.0.0.1:{port}: Address already in use"):
            await KServeGrpc(Models(), generator, Metrics(), lambda _: False, "127.0.0.1", port).__aenter__()
