"""The public model over a scripted engine, in the dialects of vllm_backend and tensorrtllm_backend; no Triton."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted_engine import Events, ScriptedEngine

from dynamo_llm.hosts.base import PublicModels
from dynamo_llm.metrics import Metrics
from dynamo_llm.public.tensors import MAX_BATCH_SIZE, Tensors, faces
from dynamo_llm.service import Limits, Service, ServiceError
from kvstore.text import Tokenizer
from kvstore.wire import SamplingParams

MODEL_FOLDER = Path(__file__).parents[2] / "model_repository/demo/1/model"
TOKENIZER = Tokenizer.from_files({"tokenizer.json": (MODEL_FOLDER / "tokenizer.json").read_bytes()})
TAKES = ("structured_outputs", "bad_words")
FLAGS = ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens")
INDICES = {"batch_index", "sequence_index"}
EXCLUDED = {"exclude_input_in_output": True}


class Rig:
    """One engine and its public model; what the engine was asked last is `asked`."""

    def __init__(self, tokenizer: Tokenizer | None = TOKENIZER, **options: Any) -> None:
        self.engine = ScriptedEngine(step_s=0.001, takes=TAKES)
        self.service = _service(self.engine)
        self.models = PublicModels("demo", [self.service], tokenizer, **options)

    @property
    def asked(self) -> SamplingParams:
        return self.engine.submitted[-1].sampling

    async def ask(self, tensors: Tensors, **parameters: Any) -> list[Tensors]:
        return [answer async for answer in self.models.generate(tensors, parameters)]

    async def vllm(self, parameters: dict[str, Any] | None = None, **inputs: Any) -> list[Tensors]:
        """As its clients: shapes [1] and [n]."""
        return await self.ask({name: _array(value) for name, value in inputs.items()}, **(parameters or {}))

    async def trtllm(self, **inputs: Any) -> list[Tensors]:
        """As its clients: a batch of one in front."""
        return await self.ask({name: _array(value)[None] for name, value in inputs.items()})


def _service(engine: ScriptedEngine) -> Service:
    service = Service(engine, instance="0" * 16, epoch=7, events=Events(), metrics=Metrics("demo"), limits=Limits())
    service.start()
    return service


def _array(value: Any) -> Any:
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list) and value and isinstance(value[0], str):
        return np.array([text.encode() for text in value], np.object_)
    if isinstance(value, (float, list)) and np.asarray(value).dtype == np.float64:
        return np.atleast_1d(np.array(value, np.float32))
    return np.atleast_1d(np.array(value, None if np.asarray(value).dtype == np.bool_ else np.int32))


@pytest.fixture
async def rig(eventually: Callable[..., Any]) -> AsyncIterator[Rig]:
    rig = Rig()
    yield rig
    await eventually(lambda: rig.service.in_flight == 0)
    rig.engine.close()


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dialect", "names"), [("vllm", ["demo", "demo.trtllm"]), ("tensorrtllm", ["demo.vllm", "demo"])]
)
def test_the_model_speaks_one_dialect_and_its_companion_the_other(dialect: Any, names: list[str]) -> None:
    """vLLM's shapes are whole; tensorrtllm_backend's have a batch in front, that Triton knows of."""
    made = faces("demo", dialect)
    assert [face.model for face in made] == names
    assert [face.max_batch_size for face in made] == [0, MAX_BATCH_SIZE]


# --- both -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["vllm", "trtllm"])
async def test_the_prompt_comes_first_unless_excluded(rig: Rig, dialect: str) -> None:
    """Not streaming; and a stream brings the same text in pieces, without the prompt."""
    ask = getattr(rig, dialect)
    (whole,) = await ask(text_input="Hi", max_tokens=4)
    (without,) = await ask(text_input="Hi", max_tokens=4, exclude_input_in_output=True)
    pieces = await ask(text_input="Hi", max_tokens=4, stream=True)
    assert whole["text_output"][0] == b"Hi" + without["text_output"][0]
    assert b"".join(piece["text_output"][0] for piece in pieces) == without["text_output"][0]
    assert len(pieces) == 4


@pytest.mark.parametrize("dialect", ["vllm", "trtllm"])
async def test_each_flag_adds_its_output(rig: Rig, dialect: str) -> None:
    """And none comes unasked. In tensorrtllm_backend's dialect a batch of one is in front, and counts are INT32."""
    ask, batch = getattr(rig, dialect), (1,) if dialect == "trtllm" else ()
    (bare,) = await ask(text_input="Hi", max_tokens=3)
    assert bare.keys() == {"text_output", "output_ids"} if dialect == "vllm" else {"text_output", *INDICES}
    (full,) = await ask(text_input="Hi", max_tokens=3, **{f"return_{name}": True for name in FLAGS})
    assert full["finish_reason"].reshape(-1).tolist() == [b"length"]
    assert full["cumulative_logprob"].reshape(-1).tolist() == [-3.0]
    assert full["num_input_tokens"].reshape(-1).tolist() == [len(TOKENIZER.encode("Hi")) // 4]
    assert full["num_output_tokens"].reshape(-1).tolist() == [3]
    assert full["num_output_tokens"].dtype == (np.int32 if dialect == "trtllm" else np.uint32)
    assert {full[name].shape for name in FLAGS} == {(*batch, 1)}
    for name in FLAGS:
        (answer,) = await ask(text_input="Hi", max_tokens=3, **{f"return_{name}": True})
        assert answer.keys() == bare.keys() | {name}


@pytest.mark.parametrize("dialect", ["vllm", "trtllm"])
async def test_stop_words_end_an_answer(rig: Rig, dialect: str) -> None:
    """Texts, and sequences of token ids as tensorrtllm_backend's preprocessing makes them. That one gives the stop word
    too, as its answers do."""
    ask = getattr(rig, dialect)
    words = np.array([[8, 9, 50, 60], [2, 4, -1, -1]], np.int32)
    asked = {"input_ids": [5], "max_tokens": 500, "exclude_input_in_output": True, "return_finish_reason": True}
    (answer,) = await ask(**asked, stop_words_list=words)
    assert answer["output_ids"].reshape(-1).tolist() == [6, 7, 8, 9]
    assert answer["finish_reason"].reshape(-1).tolist() == [b"stop"]
    text = TOKENIZER.decode(list(range(301, 340)))
    (answer,) = await ask(text_input=TOKENIZER.decode([300]), stop_words=[text[20:26], ""], max_tokens=500, **EXCLUDED)
    at = text.index(text[20:26])
    assert answer["text_output"][0].decode() == text[: at + 6 if dialect == "trtllm" else at]


async def test_a_stop_reaches_the_request_wherever_it_is(eventually: Callable[..., Any]) -> None:
    """Whichever instance has it, under whichever name either came; the one that stops gets one empty answer."""
    engines = [ScriptedEngine(step_s=0.001) for _ in range(2)]
    services = [_service(engine) for engine in engines]
    models = PublicModels("demo", services, TOKENIZER)
    asked = {
        "input_ids": _array([5]),
        "max_tokens": _array(900),
        "stream": _array(True),
        "return_finish_reason": _array(True),
    }
    streams = []
    for name in ("a", "b"):
        streams.append(models.generate(asked, {"request_id": name}))
        await streams[-1].__anext__()
    assert [service.in_flight for service in services] == [1, 1]
    for name, stream in zip("ba", reversed(streams), strict=True):
        tensors = {"stop": np.array([[True]]), "request_id": np.array([[name.encode()]], np.object_)}
        assert [answer async for answer in models.generate(tensors, {})] == [{}]
        rest = [answer async for answer in stream]
        assert rest[-1]["finish_reason"].tolist() == [b"cancelled"]
    await eventually(lambda: all(service.in_flight == 0 for service in services))
    for engine in engines:
        engine.close()


async def test_tritons_id_goes_before_the_clients_own(rig: Rig) -> None:
    """A host hands it over as a parameter; an unknown one stops nothing and is no error."""
    stream = rig.models.generate(
        {"input_ids": _array([5]), "max_tokens": _array(900), "stream": _array(True)},
        {"triton_request_id": "7", "request_id": "8"},
    )
    await stream.__anext__()
    assert await rig.ask({"stop": _array(True)}, request_id="8") == [{}]
    assert rig.service.in_flight == 1
    assert await rig.ask({"stop": _array(True)}, triton_request_id="7") == [{}]
    assert len([answer async for answer in stream]) < 800


async def test_a_stop_during_tokenising_is_kept(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt is tokenised in a thread: what comes meanwhile counts."""
    monkeypatch.setattr("dynamo_llm.public.request._LONG_TEXT", 0)
    request = asyncio.create_task(rig.ask({"text_input": _array("Hi"), "max_tokens": _array(900)}, request_id="a"))
    await asyncio.sleep(0)  # it waits for the thread now
    assert await rig.ask({"stop": _array(True)}, request_id="a") == [{}]
    await asyncio.wait_for(request, 0.8)  # 900 steps take longer
    assert rig.engine.cancelled


@pytest.mark.parametrize(("length", "elsewhere"), [(100, False), (1000, True)])
async def test_much_text_is_tokenised_elsewhere(monkeypatch: pytest.MonkeyPatch, length: int, elsewhere: bool) -> None:
    """All of a request counts, its prompts and its words; the loop carries routers' sessions meanwhile."""
    threads = set()
    encode = Tokenizer.encode

    def note(*arguments: Any, **more: Any) -> bytes:
        threads.add(threading.current_thread())
        return encode(*arguments, **more)

    monkeypatch.setattr(Tokenizer, "encode", note)
    rig = Rig()
    try:
        words = ["word" * (length // 4)] * 64
        weights = np.zeros((2, 64), np.float32)
        await rig.ask(
            {
                "text_input": np.array([[b"Hi"], [b"Ho"]], np.object_),
                "embedding_bias_words": np.stack([_array(words)] * 2),
                "embedding_bias_weights": weights,
                "max_tokens": np.array([[1], [1]], np.int32),
            }
        )
    finally:
        rig.engine.close()
    assert threads
    assert (threading.main_thread() not in threads) is elsewhere


@pytest.mark.parametrize("dialect", ["vllm", "trtllm"])
async def test_logprobs_are_those_of_each_token(rig: Rig, dialect: str) -> None:
    """vLLM's JSON has the token and the likeliest ones; tensorrtllm_backend's tensors have the token's own."""
    ask = getattr(rig, dialect)
    asked = {"input_ids": [300], "max_tokens": 2, "return_logprobs": True, "return_log_probs": True, **EXCLUDED}
    (answer,) = await ask(**asked, sampling_parameters='{"logprobs": 2}')
    first, second = json.loads(answer["logprobs"].reshape(-1)[0])
    assert first["301"] == {"logprob": -1.0, "rank": 1, "decoded_token": TOKENIZER.decode([301])}
    assert first["302"] == {"logprob": -2.0, "rank": 2, "decoded_token": TOKENIZER.decode([302])}
    assert list(second) == ["302", "303"]
    assert answer["output_log_probs"].tolist() == ([[[-1.0, -1.0]]] if dialect == "trtllm" else [[-1.0, -1.0]])
    assert answer["cum_log_probs"].tolist() == ([[-2.0]] if dialect == "trtllm" else [-2.0])


async def test_logprobs_that_were_not_asked_for_are_null(rig: Rig) -> None:
    """As in vllm_backend, though another output made the engine give some."""
    (answer,) = await rig.vllm(text_input="Hi", return_logprobs=True, return_cumulative_logprob=True)
    assert answer["logprobs"].tolist() == [b"null"]


async def test_a_logprob_of_minus_infinity_is_json(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that a bias excludes; JSON has no infinities."""
    advance = ScriptedEngine._advance

    def without(engine: ScriptedEngine, running: Any) -> Any:
        output = advance(engine, running)
        for entry in output.logprobs or []:
            entry.top.append((7, float("-inf")))
        return output

    monkeypatch.setattr(ScriptedEngine, "_advance", without)
    (answer,) = await rig.vllm(
        input_ids=[300], sampling_parameters='{"logprobs": 2, "max_tokens": 1}', return_logprobs=True
    )
    assert json.loads(answer["logprobs"][0])[0].keys() == {"301", "302"}
    (answer,) = await rig.vllm(
        input_ids=[300], sampling_parameters='{"logprobs": 3, "max_tokens": 1}', return_logprobs=True
    )
    assert "Infinity" not in answer["logprobs"][0].decode()


# --- vllm_backend ---------------------------------------------------------------------------------------------------


async def test_sampling_parameters_are_vllms(rig: Rig) -> None:
    """Strings of numbers, as its sample client sends them, and what only the engine knows."""
    document = {
        "temperature": "0.1",
        "top_p": "0.95",
        "max_tokens": "100",
        "logit_bias": {"7": 5},
        "bad_words": ["a b"],
    }
    await rig.vllm(text_input="Hi", sampling_parameters=json.dumps(document))
    assert (rig.asked.temperature, rig.asked.top_p, rig.asked.max_tokens) == (0.1, 0.95, 100)
    assert rig.asked.logit_bias == {7: 5.0}
    assert rig.asked.extra == {"bad_words": ["a b"]}


async def test_request_parameters_count_where_there_is_no_document(rig: Rig) -> None:
    """But for those that are Triton's own."""
    await rig.vllm({"max_tokens": "3", "id": "x", "request_id": "y", "triton_z": 1}, text_input="Hi")
    assert rig.asked.max_tokens == 3
    await rig.vllm({"max_tokens": 3}, text_input="Hi", sampling_parameters='{"max_tokens": 4}')
    assert rig.asked.max_tokens == 4


@pytest.mark.parametrize("name", ["structured_outputs", "guided_decoding"])
async def test_guides_are_json_in_json(rig: Rig, name: str) -> None:
    """As Triton's OpenAI frontend makes them from vLLM's class, and by the older name: without what says nothing."""
    fields = {"json": '{"type": "object"}', "regex": None, "backend": None, "_backend_was_auto": False}
    await rig.vllm(text_input="Hi", sampling_parameters=json.dumps({name: json.dumps(fields)}))
    assert rig.asked.extra == {"structured_outputs": {"json": '{"type": "object"}'}}
    await rig.vllm(text_input="Hi", sampling_parameters=json.dumps({name: {"regex": "a+"}}))
    assert rig.asked.extra == {"structured_outputs": {"regex": "a+"}}


async def test_several_answers_come_as_several_elements(rig: Rig) -> None:
    """`n`, streaming and not; as in vLLM each has a seed of its own."""
    given = {"text_input": "Hi", "sampling_parameters": '{"n": 3, "max_tokens": 4, "seed": 18446744073709551614}'}
    (answer,) = await rig.vllm(**given, return_num_output_tokens=True)
    assert len(set(answer["text_output"])) == 1
    assert answer["num_output_tokens"].tolist() == [4, 4, 4]
    assert [request.sampling.seed for request in rig.engine.submitted] == [2**64 - 2, 2**64 - 1, 0]
    pieces = await rig.vllm(**given, stream=True)
    for index, text in enumerate(answer["text_output"]):
        assert b"Hi" + b"".join(piece["text_output"][index] for piece in pieces) == text


async def test_a_lora_adapter_goes_by_its_name(rig: Rig) -> None:
    """`lora_name` of vllm_backend; tensorrtllm_backend has numbers, and 0 is none."""
    await rig.vllm(text_input="Hi", sampling_parameters='{"lora_name": "doll", "cache_salt": "s", "priority": 2}')
    assert rig.engine.submitted[-1].lora == "doll"
    assert (rig.engine.submitted[-1].cache_salt, rig.engine.submitted[-1].priority) == ("s", 2)
    await rig.trtllm(text_input="Hi", lora_task_id=7)
    assert rig.engine.submitted[-1].lora == "7"
    await rig.trtllm(text_input="Hi", lora_task_id=0)
    assert rig.engine.submitted[-1].lora == ""


# --- tensorrtllm_backend --------------------------------------------------------------------------------------------


async def test_ids_are_answered_in_ids(rig: Rig) -> None:
    """As by its core model: `[batch, beam, tokens]`, with their number; `input_lengths` cuts the padding off."""
    given = {"input_ids": [5, 6, 0, 0], "input_lengths": 2, "request_output_len": 3}
    (answer,) = await rig.trtllm(**given)
    assert answer.keys() == {"output_ids", "sequence_length", *INDICES}
    assert answer["output_ids"].tolist() == [[[5, 6, 7, 8, 9]]]
    assert answer["sequence_length"].tolist() == [[5]]
    (answer,) = await rig.trtllm(**given, exclude_input_in_output=True)
    assert answer["output_ids"].tolist() == [[[7, 8, 9]]]
    answers = await rig.trtllm(**given, streaming=True)
    assert [answer["output_ids"].tolist() for answer in answers] == [[[[7]]], [[[8]]], [[[9]]]]


async def test_a_batch_is_answered_prompt_by_prompt(rig: Rig) -> None:
    """Each with its place in the batch, in one stream; what is asked may differ."""
    tensors = {
        "text_input": np.array([[b"Hi"], [b"Hello"]], np.object_),
        "max_tokens": np.array([[2], [3]], np.int32),
        "num_return_sequences": np.array([[1], [2]], np.int32),
        "return_num_output_tokens": np.array([[True], [True]]),
    }
    answers = await rig.ask(tensors)
    got = {(a["batch_index"].item(), a["sequence_index"].item()): a for a in answers}
    assert sorted(got) == [(0, 0), (1, 0), (1, 1)]
    assert got[0, 0]["text_output"][0].startswith(b"Hi")
    assert got[1, 1]["text_output"][0].startswith(b"Hello")
    assert {key: a["num_output_tokens"].tolist() for key, a in got.items()} == {
        (0, 0): [[2]],
        (1, 0): [[3]],
        (1, 1): [[3]],
    }


async def test_greedy_unless_told_otherwise(rig: Rig) -> None:
    """TensorRT-LLM's defaults: a temperature alone does not make it sample; a `top_p` of 0 is none."""
    await rig.trtllm(text_input="Hi", temperature=0.7, runtime_top_p=0.0)
    assert rig.asked.temperature == 0.0
    await rig.trtllm(text_input="Hi", temperature=0.5, top_k=5, seed=3, repetition_penalty=1.5, min_length=2)
    asked = rig.asked
    assert (asked.temperature, asked.top_k, asked.seed, asked.repetition_penalty, asked.min_tokens) == (
        0.5,
        5,
        3,
        1.5,
        2,
    )
    await rig.trtllm(text_input="Hi", temperature=0.5, top_p=0.5)
    assert (rig.asked.temperature, rig.asked.top_p) == (0.5, 0.5)


async def test_an_end_id_alone_ends_an_answer(rig: Rig) -> None:
    """-1: nothing does."""
    await rig.trtllm(text_input="Hi", end_id=2, pad_id=2)
    assert (rig.asked.ignore_eos, rig.asked.stop_token_ids) == (True, (2,))
    await rig.trtllm(text_input="Hi", end_id=-1)
    assert (rig.asked.ignore_eos, rig.asked.stop_token_ids) == (True, ())


async def test_bad_words_of_one_token_are_biases(rig: Rig) -> None:
    """Every engine has those; longer ones need the engine's own option."""
    word = TOKENIZER.decode([301])
    assert np.frombuffer(TOKENIZER.encode(word, add_special_tokens=False), "<u4").tolist() == [301]
    longer = TOKENIZER.decode([301, 302, 303])
    await rig.trtllm(text_input="Hi", bad_words=[word, longer, ""])
    assert rig.asked.logit_bias == {301: -100.0}
    assert rig.asked.extra == {"bad_words": [longer]}
    await rig.trtllm(text_input="Hi", bad_words_list=np.array([[7, 301, 302, 303], [1, 4, -1, -1]], np.int32))
    assert rig.asked.logit_bias == {7: -100.0}
    assert rig.asked.extra == {"bad_words": [longer]}


async def test_an_embedding_bias_is_on_each_token_of_a_word(rig: Rig) -> None:
    """Biases of the same token add up, and those of the JSON stay."""
    words, tokens = [TOKENIZER.decode([301]), TOKENIZER.decode([301, 302, 303])], {}
    for word, weight in zip(words, (2.0, -1.0), strict=True):
        for token in np.frombuffer(TOKENIZER.encode(word, add_special_tokens=False), "<u4").tolist():
            tokens[token] = tokens.get(token, 0.0) + weight
    await rig.trtllm(
        text_input="Hi",
        embedding_bias_words=words,
        embedding_bias_weights=[2.0, -1.0],
        sampling_parameters='{"logit_bias": {"5": 1}}',
    )
    assert rig.asked.logit_bias == {5: 1.0, **tokens}


@pytest.mark.parametrize(
    ("kind", "guide", "expected"),
    [
        ("json", None, {"json_object": True}),
        ("json_schema", '{"type": "object"}', {"json": {"type": "object"}}),
        ("regex", "a+", {"regex": "a+"}),
        ("ebnf_grammar", 'root ::= "a"', {"grammar": 'root ::= "a"'}),
    ],
)
async def test_guides_become_structured_outputs(rig: Rig, kind: str, guide: str | None, expected: Any) -> None:
    """By vLLM's names, for the engine."""
    inputs = {"guided_decoding_guide_type": kind} | ({} if guide is None else {"guided_decoding_guide": guide})
    await rig.trtllm(text_input="Hi", **inputs)
    assert rig.asked.extra == {"structured_outputs": expected}


async def test_the_prompt_can_be_left_out_by_default() -> None:
    """For tensorrtllm_backend's clients, as by its configuration; vllm_backend has no such thing."""
    rig = Rig(exclude_input=True)
    (answer,) = await rig.trtllm(text_input="Hi", max_tokens=2)
    assert not answer["text_output"][0].startswith(b"Hi")
    (answer,) = await rig.trtllm(text_input="Hi", max_tokens=2, exclude_input_in_output=False)
    assert answer["text_output"][0].startswith(b"Hi")
    (answer,) = await rig.vllm(text_input="Hi", max_tokens=2)
    assert answer["text_output"][0].startswith(b"Hi")
    rig.engine.close()


async def test_as_tritons_openai_frontend_asks(rig: Rig) -> None:
    """It sends this dialect to every backend that is not named `vllm`, and reads one text and the two counts."""
    answers = await rig.ask(
        {
            "text_input": np.array([[b"Hi"]], np.object_),
            "stream": np.array([[False]]),
            "max_tokens": np.array([[5]], np.int32),
            "stop_words": np.array([[b"zzz", b"yyy"]], np.object_),
            "top_p": np.array([[1.0]], np.float32),
            "frequency_penalty": np.array([[0.0]], np.float32),
            "presence_penalty": np.array([[0.0]], np.float32),
            "seed": np.array([[3]], np.uint64),
            "temperature": np.array([[0.7]], np.float32),
            "exclude_input_in_output": np.array([[True]]),
            "return_num_input_tokens": np.array([[True]]),
            "return_num_output_tokens": np.array([[True]]),
        }
    )
    (answer,) = answers
    assert answer["text_output"].size == 1
    assert answer["num_input_tokens"].dtype == answer["num_output_tokens"].dtype == np.int32
    assert answer["num_output_tokens"].tolist() == [[5]]
    assert (rig.asked.temperature, rig.asked.top_p, rig.asked.seed) == (pytest.approx(0.7), 1.0, 3)


# --- what is refused ------------------------------------------------------------------------------------------------

ALONE = {"text_input": "Hi"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": (ALONE | {"beam_width": 2}, "beam_width must be 1: beam search is not served"),
    "context logits": (ALONE | {"return_context_logits": True}, "return_context_logits is not served: leave it out"),
    "generation logits": (ALONE | {"return_generation_logits": True}, "return_generation_logits is not served"),
    "perf metrics": (ALONE | {"return_perf_metrics": True}, "return_perf_metrics is not served"),
    "two names of one": (ALONE | {"max_tokens": 1, "request_output_len": 2}, "request_output_len and max_tokens mean"),
    "no JSON": (ALONE | {"sampling_parameters": "["}, "sampling_parameters is no JSON object"),
    "JSON of something else": (ALONE | {"sampling_parameters": "3"}, "sampling_parameters is no JSON object"),
    "deep JSON": (ALONE | {"sampling_parameters": '{"a":' * 5000}, "sampling_parameters is no JSON object"),
    "not a number": (ALONE | {"temperature": float("nan")}, "temperature must be a finite number"),
    "a large number": (ALONE | {"top_p": 1000.0}, "sampling parameters: .*top_p"),
    "no answers": (ALONE | {"num_return_sequences": 0}, r"sampling parameters: .*\.n`"),
    "many answers": (ALONE | {"num_return_sequences": 129}, r"sampling parameters: .*\.n`"),
    "a stop of nothing": ({"stop": True}, "stop needs the id of the request that it stops"),
    "unknown input": ({"text_inptu": "Hi"}, "unexpected input 'text_inptu'; did you mean 'text_input'"),
    "long unknown input": ({"x" * 9999: "Hi"}, r"unexpected input 'x{64}'$"),
    "wrong type": (ALONE | {"max_tokens": "3"}, "max_tokens must be integers, not object"),
    "no prompt": ({"max_tokens": 3}, "give either text_input or input_ids"),
    "two prompts": (ALONE | {"input_ids": [1]}, "give either text_input or input_ids"),
    "an empty prompt": ({"text_input": ""}, "the prompt is empty"),
    "no ids": ({"input_ids": np.array([], np.int32)}, "the prompt is empty"),
    "negative ids": ({"input_ids": [-1]}, "input_ids must not be negative"),
    "lengths beyond": ({"input_ids": [1], "input_lengths": 2}, "input_lengths is 2, but there are 1 input_ids"),
    "two of one": (ALONE | {"max_tokens": [1, 2]}, "max_tokens must have one element, not 2"),
    "unlike biases": (ALONE | {"embedding_bias_words": "a"}, "embedding_bias_weights must be given together"),
    "an infinite bias": (
        ALONE | {"embedding_bias_words": "a", "embedding_bias_weights": float("inf")},
        "embedding_bias_weights must be finite numbers",
    ),
    "an unknown guide": (ALONE | {"guided_decoding_guide_type": "poem"}, "guide_type must be one of json, "),
    "a guide of no type": (ALONE | {"guided_decoding_guide": "a"}, "guided_decoding_guide_type must be one of json, "),
    "a schema that is none": (
        ALONE | {"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": "{"},
        "guided_decoding_guide is no JSON",
    ),
    "a flat word list": (ALONE | {"stop_words_list": [1, 2]}, r"stop_words_list must have the shape \[2, n\]"),
    "offsets back": (ALONE | {"bad_words_list": np.array([[1, 2], [2, 1]], np.int32)}, "bad_words_list: offsets must"),
    "offsets beyond": (ALONE | {"stop_words_list": np.array([[1], [2]], np.int32)}, "stop_words_list: offsets must"),
    "a negative bad word": (
        ALONE | {"bad_words_list": np.array([[-5, -7], [2, -1]], np.int32)},
        "bad_words_list has the token id -5; the model has 0 to",
    ),
    "a stop word beyond the vocabulary": (
        ALONE | {"stop_words_list": np.array([[1 << 30], [1]], np.int32)},
        "stop_words_list has the token id 1073741824; the model has 0 to",
    ),
    "many options": (
        ALONE | {"sampling_parameters": json.dumps({str(number): 1 for number in range(257)})},
        "sampling parameters were given, 256 are allowed",
    ),
    "a huge document": (ALONE | {"sampling_parameters": " " * ((1 << 20) + 1)}, "characters, 1048576 are allowed"),
    "many words": (ALONE | {"bad_words": ["a"] * 65}, "bad_words has 65 elements, 64 are allowed"),
    "many words by id": (
        ALONE | {"stop_words_list": np.array([range(65), range(1, 66)], np.int32)},
        "stop_words_list has 65 words, 64 are allowed",
    ),
    "a long word": (ALONE | {"stop_words": ["a" * 5000]}, "stop_words has an element of more than 4096 bytes"),
    "a long word by id": (
        ALONE | {"stop_words_list": np.array([[7] * 2000, [2000] + [-1] * 1999], np.int32)},
        "stop_words_list: offsets must grow, by at most 1024",
    ),
    "a huge word list": (ALONE | {"bad_words_list": np.zeros((2, 1 << 17), np.int32)}, "has 131072 tokens, 65536 are"),
    "a huge text": ({"text_input": "a" * 300_000}, "300000 characters do not fit the context of 1024 tokens"),
    "too many ids": ({"input_ids": [1] * 2000}, "at most 1024 tokens"),
    "many stop strings": (ALONE | {"sampling_parameters": json.dumps({"stop": ["a"] * 65})}, "65 stop strings were"),
    "a seed of 70 bits": (ALONE | {"sampling_parameters": f'{{"seed": {2**70}}}'}, "seed"),
    "an unknown option": (
        ALONE | {"sampling_parameters": '{"temprature": 1}'},
        "unknown sampling option 'temprature'; did you mean 'temperature'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("dialect", ["vllm", "trtllm"])
@pytest.mark.parametrize(("inputs", "message"), REFUSED.values(), ids=REFUSED)
async def test_bad_input_gets_one_line(rig: Rig, dialect: str, inputs: dict[str, Any], message: str) -> None:
    """It names what is wrong, in both dialects."""
    with pytest.raises(ServiceError, match=message) as caught:
        await getattr(rig, dialect)(**inputs)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


async def test_no_utf8_is_refused(rig: Rig) -> None:
    """In any text."""
    for name in ("text_input", "sampling_parameters", "stop_words"):
        tensors = {"text_input": np.array([b"Hi"], np.object_)} | {name: np.array([b"\xff"], np.object_)}
        with pytest.raises(ServiceError, match=f"{name} is no UTF-8"):
            await rig.ask(tensors)


async def test_a_stream_never_brings_the_prompt(rig: Rig) -> None:
    """Asking for that is an error in vllm_backend; the other one does not mind."""
    asked = {"text_input": "Hi", "max_tokens": 2, "stream": True, "exclude_input_in_output": False}
    with pytest.raises(ServiceError, match="exclude_input_in_output cannot be false when stream is true"):
        await rig.vllm(**asked)
    assert not (await rig.trtllm(**asked))[0]["text_output"][0].startswith(b"Hi")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"text_input": (65, 1)}, "a batch is 1 to 64 prompts, not 65"),
        ({"text_input": (0, 1)}, "a batch is 1 to 64 prompts, not 0"),
        ({"text_input": (1, 1, 1)}, "text_input has 3 dimensions"),
        ({"text_input": (2, 2)}, "text_input must have one element, not 2"),
        ({"text_input": (2, 1), "max_tokens": (1, 1)}, r"max_tokens of shape \[1, 1\] does not have the batch of 2"),
        ({"text_input": (2, 1), "max_tokens": (2,)}, r"max_tokens of shape \[2\] does not have the batch of 2"),
        ({"text_input": (2, 1), "num_return_sequences": (2, 1)}, "a request may ask for 128 answers"),
    ],
)
async def test_a_wrong_batch_is_refused(rig: Rig, tensors: dict[str, tuple[int, ...]], message: str) -> None:
    """Sizes that no prompt has, and tensors of different batches."""
    values: dict[str, Any] = {"text_input": b"Hi", "max_tokens": 3, "num_return_sequences": 100}
    made = {
        name: np.full(shape, values[name], np.object_ if name == "text_input" else np.int32)
        for name, shape in tensors.items()
    }
    with pytest.raises(ServiceError, match=message):
        await rig.ask(made)
    assert rig.engine.submitted == []


async def test_a_model_without_a_tokenizer_takes_ids_only() -> None:
    """And says so for each thing that would need one."""
    rig = Rig(tokenizer=None)
    (answer,) = await rig.trtllm(input_ids=[5], request_output_len=2)
    assert answer["output_ids"].tolist() == [[[5, 6, 7]]]
    for inputs, message in (
        ({"text_input": "Hi"}, "the model has no tokenizer.json: give input_ids"),
        ({"input_ids": [5], "stop_words": "a"}, "stop strings need a tokenizer"),
        ({"input_ids": [5], "bad_words": "a"}, "bad_words needs a tokenizer"),
        (
            {"input_ids": [5], "bad_words_list": np.array([[1, 2], [2, -1]], np.int32)},
            "bad_words_list need a tokenizer",
        ),
        (
            {"input_ids": [5], "embedding_bias_words": "a", "embedding_bias_weights": 1.0},
            "embedding_bias_words needs a tokenizer",
        ),
    ):
        with pytest.raises(ServiceError, match=message):
            await rig.trtllm(**inputs)
    rig.engine.close()


async def test_an_engine_that_refuses_in_the_middle_of_a_batch_leaves_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., Any]
) -> None:
    """The client gets the error; what was submitted before is cancelled."""
    submit = rig.engine.submit

    def once(request: Any) -> None:
        submit(request)
        monkeypatch.setattr(rig.engine, "submit", lambda request: (_ for _ in ()).throw(MemoryError))

    monkeypatch.setattr(rig.engine, "submit", once)
    tensors = {"text_input": np.array([[b"a"], [b"b"]], np.object_), "max_tokens": np.array([[900], [900]], np.int32)}
    with pytest.raises((ServiceError, MemoryError)):
        await rig.ask(tensors)
    await eventually(lambda: rig.service.in_flight == 0)
    assert rig.engine.cancelled
