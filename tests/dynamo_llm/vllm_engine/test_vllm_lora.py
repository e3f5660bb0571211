"""LoRA adapters on the real vLLM: a folder as PEFT writes it, made here for the demo model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm_driver import MODEL, hashes, resident, start

from dynamo_llm.engines.base import EngineError, RequestError

pytestmark = pytest.mark.filterwarnings("default")  # vLLM's own deprecations are not ours to mend

_RANK = 8


def _make_adapter(folder: Path, seed: int) -> str:
    """Random weights, large enough to change every answer."""
    from safetensors.numpy import save_file

    folder.mkdir()
    model = json.loads((MODEL / "config.json").read_text())
    width, layers = model["hidden_size"], model["num_hidden_layers"]
    random = np.random.default_rng(seed)
    weights = {}
    for module in (f"{layer}.self_attn.{name}" for layer in range(layers) for name in ("q_proj", "o_proj")):
        for part, shape in (("lora_A", (_RANK, width)), ("lora_B", (width, _RANK))):
            name = f"base_model.model.model.layers.{module}.{part}.weight"
            weights[name] = random.normal(0.0, 0.2, shape).astype(np.float32)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": _RANK, "lora_alpha": 2 * _RANK, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj", "o_proj"]}))
    return str(folder)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An engine with two adapters, one of which is in the batch at a time (vLLM's `max_loras`)."""
    folder = tmp_path_factory.mktemp("adapters")
    poet, clerk = (_make_adapter(folder / name, seed) for seed, name in enumerate(("poet", "clerk")))
    driver = start(lora_modules={"poet": poet, "clerk": clerk})
    yield driver
    driver.engine.close()


def test_each_adapter_and_the_base_model_answer_differently(adapted: Any, question: list[int]) -> None:
    """A request's LoRA name chooses the weights, and each answers the same whenever it is asked."""
    names = ("", "poet", "clerk")
    first = [adapted.tokens(question, lora=name, max_tokens=8, ignore_eos=True) for name in names]
    assert len({tuple(tokens) for tokens in first}) == 3
    keys = [adapted.submit(question, lora=name, max_tokens=8, ignore_eos=True) for name in reversed(names)]
    together = [[token for output in adapted.finish(key) for token in output.token_ids] for key in keys]
    assert together[::-1] == first


def test_blocks_of_an_adapter_bear_its_name(adapted: Any) -> None:
    """The same prompt has other blocks for each adapter and salt, by the hashes that routers compute for them."""
    prompt = list(range(200, 296))
    kinds: list[dict[str, str]] = [{}, {"lora": "poet"}, {"lora": "clerk"}, {"lora": "poet", "salt": "tenant"}]
    for kind in kinds:
        outputs = adapted.run(prompt, lora=kind.get("lora", ""), cache_salt=kind.get("salt", ""))
        assert outputs[0].started.cached_tokens == 0
    expected = {block for kind in kinds for block in hashes(prompt, **kind)}
    assert len(expected) == 12
    while not expected <= resident(adapted.ops):
        adapted.step()


def test_an_unknown_adapter_is_refused_and_the_known_ones_named(adapted: Any) -> None:
    """The refusal says what the engine holds."""
    with pytest.raises(RequestError, match="no LoRA adapter 'poets'; the engine holds: clerk, poet"):
        adapted.submit([1, 2, 3], lora="poets")


def test_a_broken_adapter_stops_the_start(tmp_path: Path) -> None:
    """It is found when the engine starts: a request for it would end vLLM's engine core, and all others with it."""
    good = _make_adapter(tmp_path / "good", 1)
    (tmp_path / "broken").mkdir()
    with pytest.raises(EngineError, match="does not load the adapter 'broken'") as refusal:
        start(lora_modules={"good": good, "broken": str(tmp_path / "broken")})
    assert "\n" not in str(refusal.value)
