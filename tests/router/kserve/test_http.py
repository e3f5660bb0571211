"""KServe v2 over HTTP, asked by the real tritonclient and by plain HTTP."""

import gzip
import http.client
import json
import socket
import struct
import zlib

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException

from router.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable, WorkerFailed

PROMPT = "The capital of France is Paris."
INFER, GENERATE, STREAM = (f"/v2/models/demo/{what}" for what in ("infer", "generate", "generate_stream"))


class Answer:
    def __init__(self, response):
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        return self.json["error"]

    @property
    def events(self):
        lines = self.body.decode().split("\n\n")
        assert lines.pop() == ""
        assert all(line.startswith("data: ") for line in lines)
        return [json.loads(line[len("data: ") :]) for line in lines]


def ask(faces, method, path, body=None, headers=None):
    """One request; `body` is bytes or becomes JSON."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(faces.http, timeout=20)
    try:
        connection.request(method, path, data, headers or {})
        return Answer(connection.getresponse())
    finally:
        connection.close()


def post(faces, path, body, **headers):
    return ask(faces, "POST", path, body, {k.replace("_", "-"): v for k, v in headers.items()})


def tensor(name, values, datatype, **options):
    dtype = {"BYTES": np.object_, "BOOL": bool, "INT64": np.int64}[datatype]
    array = np.array([v.encode() if isinstance(v, str) else v for v in values], dtype)
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, **options)
    return made


def json_tensor(name="text_input", data=(PROMPT,), datatype="BYTES", shape=None, **more):
    return {"name": name, "datatype": datatype, "shape": shape or [len(data)], "data": list(data), **more}


@pytest.fixture
def client(faces):
    with triton.InferenceServerClient(faces.http) as made:
        yield made


def test_health_and_metadata(client, faces):
    """The client's own parsers take health, server metadata, model metadata and config."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("demo")
    assert client.is_model_ready("demo", "1")
    assert not client.is_model_ready("demo", "2")
    assert not client.is_model_ready("nothing")
    assert client.get_server_metadata()["name"] == "dynamo-llm"
    metadata, config = client.get_model_metadata("demo", "1"), client.get_model_config("demo")
    assert metadata["versions"] == ["1"]
    assert [t["name"] for t in metadata["inputs"]] == [t["name"] for t in config["input"]]
    assert [t["name"] for t in metadata["outputs"]] == [t["name"] for t in config["output"]]
    assert config["model_transaction_policy"] == {"decoupled": True}


def test_known_is_not_ready(client, faces):
    """A model whose workers are registered but take nothing yet is not ready, nor is a server without another one."""
    faces.serving = {"org/demo"}
    assert client.is_server_ready()
    assert not client.is_model_ready("demo")
    assert client.is_model_ready("org/demo")
    assert not client.is_model_ready("nothing")
    faces.serving = set()
    assert not client.is_server_ready()
    assert client.is_server_live()


def test_model_names_may_have_slashes(client):
    """Hugging Face names work in paths as they are."""
    assert client.get_model_metadata("org/demo")["name"] == "org/demo"
    assert (
        client.infer("org/demo", [tensor("text_input", [PROMPT], "BYTES")]).get_response()["model_name"] == "org/demo"
    )


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_infer_in_json_and_binary(client, tokenizer, binary_in, binary_out):
    """Inputs and outputs may be JSON or binary, in any mixture."""
    inputs = [tensor("text_input", [PROMPT], "BYTES", binary_data=binary_in)]
    inputs.append(tensor("return_num_input_tokens", [True], "BOOL", binary_data=not binary_in))
    names = ["text_output", "num_input_tokens", "output_ids"]
    outputs = None
    if binary_out is not None:
        outputs = [triton.InferRequestedOutput(name, binary_data=binary_out) for name in names]
    result = client.infer("demo", inputs, outputs=outputs, request_id="r1")
    text = result.as_numpy("text_output")[0]
    assert (text.decode() if isinstance(text, bytes) else text) == PROMPT + PROMPT
    ids = np.frombuffer(tokenizer.encode(PROMPT), "<u4")
    assert result.as_numpy("num_input_tokens").tolist() == [len(ids)]
    assert result.get_response()["id"] == "r1"
    assert result.get_response()["parameters"]["instance"] == "00000000000000aa"
    if outputs:
        expected = [i for i in ids.tolist() if i not in tokenizer.special_ids]
        assert result.as_numpy("output_ids").tolist() == expected


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compression_both_ways(client, algorithm):
    """Compressed requests are understood, and long answers come compressed to a client that takes it."""
    inputs = [tensor("text_input", [PROMPT * 50], "BYTES"), tensor("max_tokens", [2000], "INT64")]
    compression = {"request_compression_algorithm": algorithm, "response_compression_algorithm": algorithm}
    result = client.infer("demo", inputs, **compression)
    assert result.as_numpy("text_output")[0].decode() == PROMPT * 100


def test_compressed_answer_is_marked(faces):
    """The answer's Content-Encoding says how it was compressed."""
    inputs = [json_tensor(data=[PROMPT * 50]), json_tensor("max_tokens", [2000], "INT32")]
    answer = post(faces, INFER, {"inputs": inputs}, Accept_Encoding="gzip")
    assert answer.headers["content-encoding"] == "gzip"
    assert json.loads(gzip.decompress(answer.body))["outputs"][0]["data"] == [PROMPT * 100]


async def test_aio_client(faces):
    """The asyncio client gets its answer."""
    async with triton_aio.InferenceServerClient(faces.http) as client:
        result = await client.infer("demo", [tensor("text_input", [PROMPT], "BYTES")])
    assert result.as_numpy("text_output")[0].decode() == PROMPT + PROMPT


def test_generate(faces, generator):
    """Keys that name inputs are inputs, the others and what lies in `parameters` set the sampling."""
    body = {"id": "g1", "text_input": PROMPT, "exclude_input_in_output": True, "max_tokens": 4, "temperature": "0.5"}
    body |= {"parameters": {"top_k": 3, "return_num_output_tokens": True, "stop": ["zzz"]}}
    answer = post(faces, GENERATE, body)
    assert answer.status == 200
    assert answer.headers["x-dynamo-instance"] == "00000000000000aa"
    assert float(answer.headers["x-dynamo-ttft-ms"]) == 1.5
    got = answer.json
    assert (got["id"], got["model_name"], got["model_version"], got["num_output_tokens"]) == ("g1", "demo", "1", 4)
    assert PROMPT.startswith(got["text_output"])
    assert got["instance"] == "00000000000000aa"
    sampling = generator.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k) == (4, 0.5, 3)
    assert generator.requests[0].stop == ("zzz",)


def test_generate_as_tensorrtllm_users_send_it(faces, generator):
    """The usual curl line of tensorrtllm_backend's documentation is served."""
    body = {"text_input": PROMPT, "max_tokens": 20, "bad_words": "", "stop_words": "", "pad_id": 2, "end_id": 1}
    assert post(faces, GENERATE, body).json["text_output"].startswith(PROMPT)
    assert generator.requests[0].stop == ()


def test_sixteen_tokens_unless_told_otherwise(faces, generator):
    """As in vLLM, whichever endpoint is asked."""
    post(faces, INFER, {"inputs": [json_tensor()]})
    post(faces, GENERATE, {"text_input": PROMPT})
    post(faces, STREAM, {"text_input": PROMPT, "stream": True})
    assert [request.sampling.max_tokens for request in generator.requests] == [16, 16, 16]


def test_generate_stream(faces):
    """Each response is one server-sent event, the last one with the usage."""
    answer = post(faces, STREAM, {"text_input": PROMPT, "stream": True})
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-dynamo-instance"] == "00000000000000aa"
    assert "".join(event["text_output"] for event in answer.events) == PROMPT
    assert answer.events[0]["prompt_blocks"] >= 0
    assert answer.events[-1]["ttft_ms"] == 1.5


def test_generate_stream_without_streaming(faces):
    """A request that does not ask for streaming has one event with the prompt in front."""
    (event,) = post(faces, STREAM, {"text_input": PROMPT}).events
    assert event["text_output"] == PROMPT + PROMPT


def test_generate_stream_error_before_and_after_the_first_event(faces, generator):
    """An error is a status while nothing was sent, and an event afterwards."""
    generator.error = InvalidRequest("no such thing")
    answer = post(faces, STREAM, {"text_input": PROMPT, "stream": True})
    assert (answer.status, answer.error) == (400, "no such thing")
    generator.error, generator.fail_after = WorkerFailed("the worker is gone"), 2
    answer = post(faces, STREAM, {"text_input": PROMPT, "stream": True})
    assert answer.status == 200
    assert answer.events[-1] == {"error": "the worker is gone"}
    assert faces.metrics.requests[("kserve_generate_stream", "demo", "400")] == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidRequest("no"), 400),
        (Overloaded("no", retry_after_s=1.2), 429),
        (Unavailable("no", retry_after_s=3), 503),
        (DeadlineExceeded("no"), 504),
        (WorkerFailed("no"), 500),
        (ZeroDivisionError("secret"), 500),
    ],
)
@pytest.mark.parametrize("path", [INFER, GENERATE, STREAM])
def test_error_statuses(faces, generator, error, status, path):
    """Each error of the router has its HTTP status and KServe's form; overload says when to come back."""
    generator.error = error
    body = {"inputs": [json_tensor()]} if path == INFER else {"text_input": PROMPT}
    answer = post(faces, path, body)
    assert answer.status == status
    assert set(answer.json) == {"error"}
    assert "secret" not in answer.error
    if status in (429, 503):
        assert int(answer.headers["retry-after"]) in (2, 3)


def test_unknown_model_and_version(faces):
    """Both are 404, worded as Triton does."""
    for path, message in [
        ("/v2/models/nothing/infer", "Request for unknown model: 'nothing' is not found"),
        ("/v2/models/demo/versions/7/generate", "Request for unknown model: 'demo' version 7 is not found"),
    ]:
        answer = post(faces, path, {"text_input": PROMPT})
        assert (answer.status, answer.error) == (404, message)
    assert faces.metrics.requests[("kserve_infer", "", "404")] == 1
    assert post(faces, "/v2/models/demo/versions/1/generate", {"text_input": PROMPT}).status == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/demo/stats", 501),
        ("GET", "/v2/models/stats", 501),
        ("POST", "/v2/repository/index", 501),
        ("POST", "/v2/repository/models/demo/load", 501),
        ("GET", "/v2/systemsharedmemory/status", 501),
        ("POST", "/v2/cudasharedmemory/region/x/register", 501),
        ("POST", "/v2/models/demo/trace/setting", 501),
        ("GET", "/v2/logging", 501),
        ("GET", "/v2/nowhere", 404),
        ("PUT", "/v2/models/demo/infer", 404),
    ],
)
def test_other_paths(faces, method, path, status):
    """Triton's other endpoints answer 501, anything else 404, both in KServe's form."""
    answer = ask(faces, method, path)
    assert answer.status == status
    assert path in answer.error


BAD_TENSORS = {
    "no inputs": ([], "text_input"),
    "unknown input": ([json_tensor(), json_tensor("text_inptu")], "text_input"),
    "twice": ([json_tensor(), json_tensor()], "text_input"),
    "text and ids": ([json_tensor(), json_tensor("input_ids", [1], "INT32")], "input_ids"),
    "two texts": ([json_tensor(data=["a", "b"])], "text_input"),
    "empty shape": ([json_tensor(shape=[0], data=[])], "text_input"),
    "negative shape": ([json_tensor(shape=[-1])], "text_input"),
    "huge shape": ([json_tensor("input_ids", [1], "INT32", shape=[2**62, 2**62])], "input_ids"),
    "deep shape": ([json_tensor(shape=[1] * 9)], "text_input"),
    "more than the context": ([json_tensor("input_ids", [1], "INT32", shape=[10**6])], "input_ids"),
    "wrong datatype": ([json_tensor(datatype="INT32", data=[1])], "text_input"),
    "hostile datatype": ([json_tensor(datatype="X" * 5000)], "text_input"),
    "number for text": ([json_tensor(data=[7])], "text_input"),
    "text for number": ([json_tensor(), json_tensor("max_tokens", ["7"], "INT32")], "max_tokens"),
    "number for bool": ([json_tensor(), json_tensor("stream", [1], "BOOL")], "stream"),
    "out of range": ([json_tensor(), json_tensor("max_tokens", [2**31], "INT32")], "max_tokens"),
    "beyond 64 bits": ([json_tensor(), json_tensor("seed", [10**30], "UINT64")], "seed"),
    "beyond 64 bits as float": ([json_tensor(), json_tensor("temperature", [10**400], "FP32")], "temperature"),
    "fewer than the shape": ([json_tensor("input_ids", [1, 2], "INT32", shape=[3])], "input_ids"),
    "more than the shape": ([json_tensor("input_ids", [1, 2], "INT32", shape=[1])], "input_ids"),
    "negative ids": ([json_tensor("input_ids", [3, -1], "INT32")], "input_ids"),
    "ids beyond 32 bits": ([json_tensor("input_ids", [2**40], "INT64")], "input_ids"),
    "no ids": ([json_tensor("input_ids", [], "INT32", shape=[0])], "input_ids"),
    "nested": ([json_tensor(data=[[[[[[[[[[PROMPT]]]]]]]]]])], "text_input"),
    "no data": ([{"name": "text_input", "datatype": "BYTES", "shape": [1]}], "text_input"),
    "data and size": ([json_tensor(parameters={"binary_data_size": 0})], "text_input"),
    "size not there": ([json_tensor(parameters={"binary_data_size": 99})], "text_input"),
    "size no number": ([json_tensor(parameters={"binary_data_size": "9"})], "text_input"),
    "sampling no JSON": ([json_tensor(), json_tensor("sampling_parameters", ["{"])], "sampling_parameters"),
    "sampling no object": ([json_tensor(), json_tensor("sampling_parameters", ["[1]"])], "sampling_parameters"),
    "sampling deep": ([json_tensor(), json_tensor("sampling_parameters", ['{"extra":' * 5000])], "sampling_parameters"),
    "sampling unknown": ([json_tensor(), json_tensor("sampling_parameters", ['{"tempratur": 1}'])], "temperature"),
    "sampling bounds": ([json_tensor(), json_tensor("sampling_parameters", ['{"top_p": 2}'])], "top_p"),
    "sampling not finite": ([json_tensor(), json_tensor("sampling_parameters", ['{"min_p": "nan"}'])], "min_p"),
    "sampling too large": ([json_tensor(), json_tensor("sampling_parameters", [f'{{"seed": {10**30}}}'])], "seed"),
    "sampling id too large": (
        [json_tensor(), json_tensor("sampling_parameters", [f'{{"stop_token_ids": [{10**30}]}}'])],
        "sampling",
    ),
    "several answers": ([json_tensor(), json_tensor("sampling_parameters", ['{"n": 2}'])], "n must be 1"),
    "stream here": ([json_tensor(), json_tensor("stream", [True], "BOOL")], "stream"),
    "bad words": ([json_tensor(), json_tensor("bad_words", ["x"])], "bad_words"),
    "stop words": ([json_tensor(), json_tensor("stop_words", ["x"] * 65)], "stop_words"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors(faces, generator, case):
    """Each malformed tensor is a 400 of moderate length that names it, and nothing is generated."""
    inputs, named = BAD_TENSORS[case]
    answer = post(faces, INFER, {"inputs": inputs})
    assert answer.status == 400
    assert named in answer.error
    assert len(answer.error) < 300
    assert not generator.requests


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"[]", "object"),
        (b'{"inputs": 3}', "inputs"),
        (b'{"inputs": [{"name": "text_input"}]}', "datatype"),
        (b'{"inputs": [{"name": 1, "datatype": "BYTES", "shape": [1], "data": []}]}', "name"),
        (b'{"inputs": [], "parameters": {"triton_x": 1, "tmperature": 1}}', "temperature"),
        (b'{"inputs": [], "outputs": [{"name": "text_ouput"}]}', "text_output"),
        (b"[" * 100_000, "object"),
        (b'{"inputs": ' + b"[" * 100_000, "inputs"),
        (b'{"x": ' + b"[" * 100_000, "JSON"),
        (b'{"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ' + b"[" * 10**5, "JSON"),
    ],
)
def test_bad_bodies(faces, body, named):
    """A body that is no infer request is a 400 that says where it goes wrong."""
    answer = post(faces, INFER, body)
    assert answer.status == 400
    assert named in answer.error


@pytest.mark.parametrize("length", ["x", "-1", "9999", "1e3", "9" * 400, "٣"])
def test_bad_header_length(faces, length):
    """Inference-Header-Content-Length must lie within the body."""
    answer = post(faces, INFER, b"{}", Inference_Header_Content_Length=length.encode().decode("latin-1"))
    assert answer.status == 400
    assert "Inference-Header-Content-Length" in answer.error


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x01\x00",
        struct.pack("<I", 5) + b"Pari",
        struct.pack("<I", 2**32 - 1) + b"Paris",
        struct.pack("<I", 5) + b"Paris!",
        struct.pack("<I", 2) + b"\xff\xfe",
    ],
)
def test_bad_binary_text(faces, raw):
    """Truncated, overlong and undecodable BYTES name their tensor."""
    tensor_ = {"name": "text_input", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(raw)}}
    header = json.dumps({"inputs": [tensor_]}).encode()
    answer = post(faces, INFER, header + raw, Inference_Header_Content_Length=str(len(header)))
    assert answer.status == 400
    assert "text_input" in answer.error


def test_surplus_binary_data(faces):
    """Bytes that belong to no input are an error."""
    header = json.dumps({"inputs": [json_tensor()]}).encode()
    answer = post(faces, INFER, header + b"xyz", Inference_Header_Content_Length=str(len(header)))
    assert (answer.status, answer.error) == (400, "the body has 3 bytes more than its inputs")


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "text_input"),
        ({"text_input": 3}, "text_input"),
        ({"text_input": ["a", "b"]}, "text_input"),
        ({"text_input": ""}, "text_input"),
        ({"text_input": PROMPT, "stream": "yes"}, "stream"),
        ({"text_input": PROMPT, "stream": True}, "generate_stream"),
        ({"text_input": PROMPT, "max_tokens": 0}, "max_tokens"),
        ({"text_input": PROMPT, "max_token": 1}, "max_tokens"),
        ({"text_input": PROMPT, "parameters": 3}, "parameters"),
        ({"text_input": PROMPT, "id": 3}, "id"),
        ({"text_input": {"a": 1}}, "text_input"),
        ({"text_input": "word " * 3000}, "text_input"),
        ([], "object"),
    ],
)
def test_bad_generate(faces, body, named):
    """Malformed generate requests are a 400 that names the key."""
    answer = post(faces, GENERATE, body)
    assert answer.status == 400
    assert named in answer.error


def test_body_limit(faces):
    """A body beyond the limit is a 413, compressed or not."""
    large = json.dumps({"text_input": "x" * 300_000}).encode()
    assert post(faces, GENERATE, large).status == 413
    assert post(faces, GENERATE, zlib.compress(large), Content_Encoding="deflate").status == 413
    assert post(faces, GENERATE, gzip.compress(b"\0" * 10**7), Content_Encoding="gzip").status == 413


@pytest.mark.parametrize(
    ("body", "encoding"), [(b"zzz", "gzip"), (gzip.compress(b"{}")[:-9], "gzip"), (b"{}", "br"), (b"{}", "deflate")]
)
def test_bad_compression(faces, body, encoding):
    """A body that is not what Content-Encoding says is a 400."""
    assert post(faces, GENERATE, body, Content_Encoding=encoding).status == 400


def test_shared_memory_is_refused(client):
    """Tensors in shared memory are a 501 that names the tensor."""
    made = triton.InferInput("text_input", [1], "BYTES")
    made.set_shared_memory("region", 16)
    with pytest.raises(InferenceServerException, match="text_input") as caught:
        client.infer("demo", [made])
    assert caught.value.status() == "501"


@pytest.mark.parametrize("path", [INFER, GENERATE, STREAM])
def test_client_that_goes_away(faces, generator, until, path):
    """Closing the connection cancels the request, also while nothing is being sent."""
    generator.hold_after = 2 if path == STREAM else 0
    body = {"inputs": [json_tensor()]} if path == INFER else {"text_input": PROMPT, "stream": path == STREAM}
    data = json.dumps(body | {"id": "gone"}).encode()
    with socket.create_connection(("127.0.0.1", faces.http_port)) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        until(lambda: generator.requests)
    until(lambda: generator.cancelled == ["gone"])
    endpoint = f"kserve_{path.rsplit('/', 1)[1]}"
    until(lambda: faces.metrics.requests == {(endpoint, "demo", "499"): 1})


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cut=st.integers(0, 400),
    noise=st.binary(min_size=1, max_size=8),
    length=st.none() | st.integers(0, 400),
    path=st.sampled_from([INFER, GENERATE, STREAM]),
)
def test_damaged_bodies(faces, cut, noise, length, path):
    """A request damaged at any place is answered with a 4xx in KServe's form, or understood."""
    body = json.dumps({"inputs": [json_tensor(), json_tensor("max_tokens", [1], "INT32")], "id": "x"}).encode()
    body = body[:cut] + noise + body[cut + len(noise) :]
    headers = {} if length is None else {"Inference-Header-Content-Length": str(length)}
    answer = ask(faces, "POST", path, body, headers)
    if answer.status != 200:
        assert 400 <= answer.status < 500
        assert answer.error
