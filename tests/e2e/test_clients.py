"""The clients that people already have, over the network, against real engines whose answers are asserted."""

import json
import urllib.error
import urllib.request
from collections.abc import Callable

import numpy as np
import openai
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http

SYSTEM = "You are a helpful assistant. Answer clearly and briefly. " * 78
"""Some 1,000 tokens."""
CAPITAL = ("What is the capital of France?", "The capital of France is Paris.")
SUM = ("What is 12 + 30?", "12 + 30 = 42.")
COUNT = ("Count from 3 to 30.", ", ".join(map(str, range(3, 31))) + ".")


def openai_client(cluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.base}/v1", api_key="none", max_retries=0, timeout=60)


def ask(client: openai.OpenAI, question: str, system: str = "", **more):
    """The completion, and the instance that served it."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    raw = client.chat.completions.with_raw_response.create(model="demo", messages=messages, temperature=0, **more)
    return raw.parse(), raw.headers["x-dynamo-instance"]


def prompt(question: str) -> str:
    return f"<|begin|><|user|>{question}<|end|><|assistant|>"


def test_users_of_one_system_prompt_meet_where_it_is_cached(cluster) -> None:
    """Two users of one 1,000-token system prompt land on the worker that holds it and are told what was reused."""
    with openai_client(cluster) as one, openai_client(cluster) as two:
        first, holder = ask(one, CAPITAL[0], SYSTEM)
        assert first.choices[0].message.content == CAPITAL[1]
        assert first.usage.prompt_tokens > 1000
        cluster.wait(lambda status: any(m["index"]["blocks"] * m["block_size"] > 1000 for m in status["models"]))
        for question, expected in (SUM, COUNT, CAPITAL):
            answer, instance = ask(two, question, SYSTEM)
            assert answer.choices[0].message.content == expected
            assert instance == holder
            assert answer.usage.prompt_tokens_details.cached_tokens > 900


def test_round_robin_spreads_them(start_cluster: Callable) -> None:
    """With `--mode agg` the same users are spread over the workers."""
    cluster = start_cluster("--mode", "agg", "--workers", "2")
    with openai_client(cluster) as client:
        served = [ask(client, question, SYSTEM)[1] for question, _ in (CAPITAL, SUM, COUNT, CAPITAL)]
    assert served[0] != served[1]
    assert served == served[:2] * 2
    assert cluster.stop() == 0


def test_streamed_and_whole_answers_agree(cluster) -> None:
    """Streamed deltas add up to the whole answer, with the same usage."""
    with openai_client(cluster) as client:
        whole, _ = ask(client, COUNT[0])
        stream, _ = ask(client, COUNT[0], stream=True, stream_options={"include_usage": True})
        chunks = list(stream)
    assert whole.choices[0].message.content == COUNT[1]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == COUNT[1]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"


def test_sampling_parameters_reach_the_engine(cluster) -> None:
    """n, seed, stop strings, max_tokens and logprobs do what OpenAI's documentation says."""
    with openai_client(cluster) as client:
        story = {"model": "demo", "messages": [{"role": "user", "content": "Tell me a story about a fox."}]}
        one = client.chat.completions.create(**story, n=2, seed=7, temperature=1.5, max_tokens=40)
        two = client.chat.completions.create(**story, n=2, seed=7, temperature=1.5, max_tokens=40)
        assert [c.message.content for c in one.choices] == [c.message.content for c in two.choices]
        assert one.choices[0].message.content != one.choices[1].message.content
        assert one.usage.completion_tokens == 80
        assert {c.finish_reason for c in one.choices} == {"length"}
        stopped, _ = ask(client, COUNT[0], stop=["11, 12"])
        assert stopped.choices[0].message.content == "3, 4, 5, 6, 7, 8, 9, 10, "
        likely, _ = ask(client, CAPITAL[0], logprobs=True, top_logprobs=3)
        entries = likely.choices[0].logprobs.content
        assert "".join(e.token for e in entries).startswith(CAPITAL[1])
        assert all(len(e.top_logprobs) == 3 and e.logprob == e.top_logprobs[0].logprob for e in entries)


def test_text_completions(cluster) -> None:
    """/v1/completions takes strings and token ids."""
    with openai_client(cluster) as client:
        answers = client.completions.create(model="demo", prompt=[prompt(CAPITAL[0]), prompt(SUM[0])], temperature=0)
        assert [c.text for c in answers.choices] == [CAPITAL[1], SUM[1]]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b'{"model": "demo"}', 400),
        (b'{"model": "nobody", "messages": [{"role": "user", "content": "Hi"}]}', 404),
        (b'{"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "temperature": -1}', 400),
        (json.dumps({"model": "demo", "messages": [{"role": "user", "content": "a b " * 3000}]}).encode(), 400),
    ],
    ids=["no json", "no messages", "unknown model", "bad temperature", "over-long prompt"],
)
def test_bad_requests(cluster, body: bytes, status: int) -> None:
    """What cannot be served is answered in OpenAI's form, with one line."""
    request = urllib.request.Request(f"{cluster.base}/v1/chat/completions", body, {"content-type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=30)
    with caught.value as answer:
        error = json.load(answer)["error"]
    assert answer.code == status
    assert error["message"]
    assert "\n" not in error["message"]


def test_tritonclient_http(cluster) -> None:
    """Metadata, config and a binary infer by tritonclient.http."""
    with triton_http.InferenceServerClient(cluster.base.removeprefix("http://")) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("demo")
        assert client.get_model_metadata("demo")["name"] == "demo"
        assert client.get_model_config("demo")["model_transaction_policy"]["decoupled"]
        text = triton_http.InferInput("text_input", [1], "BYTES")
        text.set_data_from_numpy(np.array([prompt(CAPITAL[0]).encode()], np.object_))
        exclude = triton_http.InferInput("exclude_input_in_output", [1], "BOOL")
        exclude.set_data_from_numpy(np.array([True]))
        parameters = triton_http.InferInput("sampling_parameters", [1], "BYTES")
        parameters.set_data_from_numpy(np.array([b'{"temperature": 0, "max_tokens": 64}'], np.object_))
        answer = client.infer("demo", [text, exclude, parameters])
        assert answer.as_numpy("text_output").reshape(-1)[0].decode() == CAPITAL[1]


def test_generate(cluster) -> None:
    """Triton's generate extension, plain and streamed."""
    body = {"text_input": prompt(COUNT[0]), "exclude_input_in_output": True, "temperature": 0, "stream": False}
    body["max_tokens"] = 300
    url = f"{cluster.base}/v2/models/demo/generate"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=60) as answer:
        assert json.load(answer)["text_output"] == COUNT[1]
    body["stream"] = True
    with urllib.request.urlopen(
        urllib.request.Request(f"{url}_stream", json.dumps(body).encode()), timeout=60
    ) as answer:
        events = [json.loads(line[5:]) for line in answer if line.startswith(b"data:")]
    assert len(events) > 5
    assert "".join(e["text_output"] for e in events) == COUNT[1]


def test_tritonclient_straight_to_a_worker(cluster) -> None:
    """A worker's public model answers a Triton client without any router, token ids in and out."""
    address = cluster.instances()[0]["address"]
    with triton_grpc.InferenceServerClient(address) as client:
        assert client.is_model_ready("demo")
        ids = triton_grpc.InferInput("text_input", [1], "BYTES")
        ids.set_data_from_numpy(np.array([prompt(SUM[0]).encode()], np.object_))
        parameters = triton_grpc.InferInput("sampling_parameters", [1], "BYTES")
        parameters.set_data_from_numpy(np.array([b'{"temperature": 0, "max_tokens": 64}'], np.object_))
        answers: list = []
        client.start_stream(lambda result, error: answers.append(error or result))
        client.async_stream_infer("demo", [ids, parameters])
        client.stop_stream()
    (answer,) = [a for a in answers if a.as_numpy("text_output") is not None and a.as_numpy("text_output").size]
    assert answer.as_numpy("text_output").reshape(-1)[0].decode().endswith(SUM[1])
