"""Model folders of every supported kind give transformers' tokens; others are refused in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dynamo_llm.engines import create_engine
from dynamo_llm.engines.base import EngineError
from dynamo_llm.engines.torch_engine.model_config import read_model_config
from dynamo_llm.engines.torch_engine.rope import rope_table

Make = Callable[..., Any]

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,
    "eos_token_id": [3, 4],
    "bos_token_id": 1,
    "pad_token_id": 0,
}
PROMPT = [7, 90, 13, 55, 21, 8, 64, 33, 2, 71, 18, 40, 96, 5, 27, 60, 11, 39, 84, 10]


def save(folder: Path, kind: str = "Llama", *, shard: str = "5GB", **config: Any) -> Any:
    """A random small model of transformers in a folder; returns it."""
    torch.manual_seed(5)
    made = getattr(transformers, f"{kind}Config")(**(SMALL | config))
    model = getattr(transformers, f"{kind}ForCausalLM")(made).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def compare(make: Make, folder: Path, model: Any, tokens: int = 40, attention: str = "native") -> None:
    """Greedy tokens and their logprobs, a long way into the context."""
    driver = make(folder, kv_blocks=32, attention=attention)
    key = driver.submit(PROMPT * 4, max_tokens=tokens, logprobs=0)
    driver.run()
    answer = driver.tokens(key)
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT * 4 + answer])).logits[0, len(PROMPT) * 4 - 1 : -1]
    assert logits.argmax(-1).tolist() == answer
    expected = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()
    assert [entry.logprob for entry in driver.logprobs(key)] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("attention", ["native", "sdpa"])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("Llama", {"tie_word_embeddings": False}),
        ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("Llama", {"num_key_value_heads": 4, "head_dim": 16, "rms_norm_eps": 1e-3}),
        ("Llama", {"num_key_value_heads": 1}),
        ("Mistral", {"sliding_window": None, "head_dim": 8}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", {"head_dim": 16, "attention_bias": False}),
    ],
)
def test_architectures(make: Make, tmp_path: Path, kind: str, config: dict[str, Any], attention: str) -> None:
    """Biases, head norms, tied and untied embeddings, every grouping of heads."""
    compare(make, tmp_path, save(tmp_path, kind, **config), attention=attention)


def test_sharded_weights(make: Make, tmp_path: Path) -> None:
    """Weights in several files are found through their index."""
    model = save(tmp_path, shard="20KB", tie_word_embeddings=False)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    compare(make, tmp_path, model)


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, everything set": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
        "mscale": 0.8,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
    "yarn, attention factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.7,
    },
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_scalings(make: Make, tmp_path: Path, name: str) -> None:
    """Tokens and logprobs under each scaling, and each scaling is another table."""
    rope = {"rope_theta": 10000.0} | ROPES[name]
    model = save(tmp_path, rope_parameters=rope)
    compare(make, tmp_path, model)
    config = read_model_config(tmp_path)
    table = rope_table(config.rope, config.head_dim, 100, torch.device("cpu"))
    plain = rope_table({"rope_type": "default", "rope_theta": 10000.0}, config.head_dim, 100, torch.device("cpu"))
    assert torch.equal(table, plain) == (name == "dynamic")


def test_old_rope_keys(make: Make, tmp_path: Path) -> None:
    """Configs from before `rope_parameters` say the same in `rope_theta` and `rope_scaling` (with `type`)."""
    model = save(tmp_path, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0})
    edit(tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling={"type": "linear", "factor": 4.0})
    compare(make, tmp_path, model)


def test_bfloat16_on_cpu(make: Make, tmp_path: Path) -> None:
    """bfloat16 weights are computed in float32 by default, and in bfloat16 on request."""
    save(tmp_path).bfloat16().save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    compare(make, tmp_path, model)
    driver = make(tmp_path, dtype="bfloat16", kv_blocks=32)
    key = driver.submit(PROMPT * 4, max_tokens=8, logprobs=0)
    driver.run()
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT * 4 + driver.tokens(key)])).logits[0, len(PROMPT) * 4 - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(driver.tokens(key))[:, None])[:, 0].tolist()
    assert [entry.logprob for entry in driver.logprobs(key)] == pytest.approx(expected, abs=0.5)


def test_end_of_sequence_ids(tmp_path: Path) -> None:
    """Ids come from the generation config, as one or as a list, and from the config without one."""
    save(tmp_path)
    assert read_model_config(tmp_path).eos_token_ids == (3, 4)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert read_model_config(tmp_path).eos_token_ids == (9,)
    (tmp_path / "generation_config.json").unlink()
    assert read_model_config(tmp_path).eos_token_ids == (3, 4)


def edit(folder: Path, **changes: Any) -> None:
    """Change config.json; None removes a key."""
    path = folder / "config.json"
    config = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"sliding_window": 16}, "sliding"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "spiral"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"hidden_size": 64}, "shape"),
        ({"num_hidden_layers": 3}, "model.layers.2"),
        ({"vocab_size": None}, "vocab_size"),
        ({"tie_word_embeddings": False}, "lm_head.weight"),
    ],
)
def test_refused_models(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    """Models that this engine cannot run are refused in one line that says why."""
    save(tmp_path, tie_word_embeddings=True)
    edit(tmp_path, **changes)
    with pytest.raises(EngineError, match=words) as raised:
        create_engine("torch", tmp_path, "m", {"kv_blocks": 32, "device": "cpu"})
    assert "\n" not in str(raised.value)


def test_no_model_folder(tmp_path: Path) -> None:
    """A folder without a model, or without weights, is named."""
    with pytest.raises(EngineError, match=r"config\.json does not exist"):
        create_engine("torch", tmp_path, "m", {})
    save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(EngineError, match=r"no model\.safetensors"):
        create_engine("torch", tmp_path, "m", {})
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(EngineError, match="cannot be read"):
        create_engine("torch", tmp_path, "m", {})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(EngineError, match="cannot be read"):
        create_engine("torch", tmp_path, "m", {})
