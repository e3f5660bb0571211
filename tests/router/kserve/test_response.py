"""Responses of one request, without a transport."""

import json
import math

from kvstore.wire import TokenLogprob
from router.kserve.request import InferRequest, prepare
from router.kserve.response import Responder
from router.types import Delta


async def test_impossible_tokens_stay_json(model) -> None:
    """A token of probability zero has a logarithm that JSON does not know: a very small one stands for it."""
    outputs = ["logprobs", "cumulative_logprob"]
    request = InferRequest(id="", model="demo", inputs={"text_input": [b"x"]}, outputs=outputs, parameters={})
    responder = Responder(await prepare(request, model), model.tokenizer)
    entry = TokenLogprob(5, -math.inf, [(6, -0.5), (7, -math.inf)])
    made = {tensor.name: tensor.values for tensor in responder.delta([Delta("x", [5], [entry], None)]).outputs}
    (position,) = json.loads(made["logprobs"][0], parse_constant=lambda name: name)
    assert {token: value["logprob"] for token, value in position.items()} == {"5": -9999.0, "6": -0.5, "7": -9999.0}
    assert made["cumulative_logprob"] == [-9999.0]
