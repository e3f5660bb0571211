"""Engine options go to vLLM as they are. No engine is started: `test_vllm_plain.py` shows what one makes of them."""

import dataclasses
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from dynamo_llm.engines.base import Duty, EngineError
from dynamo_llm.engines.vllm_engine import transfer
from dynamo_llm.engines.vllm_engine.options import parse_options

pytestmark = pytest.mark.filterwarnings("default")  # vLLM's own deprecations are not ours to mend

_EVENTS: Any = None
"""Our configuration of the events: it is not looked at."""


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"blok_size": 16}, "did you mean 'block_size'"),
        ({"model": "other"}, "is the worker's to set"),
        ({"served_model_name": "other"}, "is the worker's to set"),
        ({"block_size": "many"}, "block_size"),
        ({"scheduling_policy": "fair"}, "scheduling_policy"),
        ({"max_waiting": "many"}, "many"),
        ({"data_parallel_size": 2}, "one worker per rank"),
        ({"lora_modules": {"poet": "/nowhere"}}, "is no folder"),
    ],
)
def test_wrong_options_give_one_line(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    """Engine options are checked before anything is loaded."""
    with pytest.raises(EngineError, match=reason) as refusal:
        parse_options(tmp_path, options, _EVENTS)
    assert "\n" not in str(refusal.value)


def test_every_engine_argument_arrives_as_given(tmp_path: Path) -> None:
    """Whatever vLLM's own class has: each field by its name, with a value of its own kind that is not the default."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    given: dict[str, Any] = {}
    for field in dataclasses.fields(AsyncEngineArgs):
        default = getattr(AsyncEngineArgs, field.name, None)
        if isinstance(default, bool):
            given[field.name] = not default
        elif isinstance(default, int) and not field.name.startswith("data_parallel"):
            given[field.name] = default * 2 if field.name == "max_lora_rank" else default + 1
    assert len(given) > 40
    args = parse_options(tmp_path, given, _EVENTS).args
    assert {name: getattr(args, name) for name in given} == given


def test_what_is_not_given_is_vllm_s_default_but_for_ours(tmp_path: Path) -> None:
    """The list of what we set is that of the documentation."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    ours, vllms = parse_options(tmp_path, {}, _EVENTS).args, AsyncEngineArgs(model=str(tmp_path))
    names = [field.name for field in dataclasses.fields(AsyncEngineArgs)]
    changed = {name for name in names if getattr(ours, name) != getattr(vllms, name)}
    assert changed == {"scheduling_policy", "max_logprobs", "disable_log_stats", "kv_cache_memory_bytes"}


def test_options_win_over_what_we_would_set(tmp_path: Path) -> None:
    """Also as text, which a command line gives: numbers, and JSON where a field holds a structure."""
    events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": "tcp://*:7001"}
    given = {
        "scheduling_policy": "fcfs",
        "max_logprobs": "5",
        "disable_log_stats": "false",
        "gpu_memory_utilization": "0.5",
        "kv_events_config": json.dumps(events),
    }
    args = parse_options(tmp_path, given, _EVENTS).args
    assert (args.scheduling_policy, args.max_logprobs, args.disable_log_stats) == ("fcfs", 5, False)
    assert (args.gpu_memory_utilization, args.kv_cache_memory_bytes) == (0.5, None)
    assert args.kv_events_config is not None
    assert args.kv_events_config.endpoint == "tcp://*:7001"


@pytest.mark.parametrize("given", [{}, {"max_loras": 1}])
def test_adapters_leave_a_place_empty_unless_told(tmp_path: Path, given: dict[str, Any]) -> None:
    """On a CPU vLLM adds the last place's weights to requests without an adapter: it has none there."""
    modules = {name: str(tmp_path) for name in ("poet", "clerk")}
    options = parse_options(tmp_path, {"lora_modules": modules, **given}, _EVENTS)
    assert options.args.enable_lora
    assert options.args.max_loras == given.get("max_loras", 3)
    assert sorted(lora.lora_int_id for lora in options.loras.values()) == [1, 2]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_role_makes_the_connector(tmp_path: Path, role: Any) -> None:
    """Blocks move by vLLM's NixlConnector; a failed load is computed again, and the options' own connector stays."""
    config = parse_options(tmp_path, {}, _EVENTS, Duty(role=role)).args.kv_transfer_config
    assert config is not None
    assert (config.kv_connector, config.kv_role, config.kv_load_failure_policy, config.kv_buffer_device) == (
        "NixlConnector",
        "kv_both",
        "recompute",
        "cpu",
    )
    given = {"kv_connector": "ExampleConnector", "kv_role": "kv_producer"}
    args = parse_options(tmp_path, {"kv_transfer_config": given}, _EVENTS, Duty(role=role)).args
    assert args.kv_transfer_config is not None
    assert {name: getattr(args.kv_transfer_config, name) for name in given} == given
    assert args.kv_transfer_config.kv_load_failure_policy == "fail"
    assert parse_options(tmp_path, {}, _EVENTS).args.kv_transfer_config is None


def test_without_nixl_a_role_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, before anything is loaded."""
    monkeypatch.setattr(transfer, "is_nixl_available", lambda: False)
    with pytest.raises(EngineError, match=r"nixl for the role prefill: pip install 'dynamo-llm\[nixl\]'"):
        parse_options(tmp_path, {}, _EVENTS, Duty(role="prefill"))


def test_each_engine_has_an_address_for_handshakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that nobody else gets while vLLM starts, at the worker's address; what the user has set stays."""
    host, port = "VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_PORT"
    monkeypatch.delenv(host, raising=False)
    monkeypatch.delenv(port, raising=False)
    duty = Duty(role="decode", host="127.0.0.1")
    args = parse_options(tmp_path, {}, _EVENTS, duty).args
    before = dict(os.environ)
    with transfer.environment(args, duty):
        first = os.environ[port]
        assert os.environ[host] == "127.0.0.1"
        with pytest.raises(OSError, match="in use"), socket.socket() as other:
            other.bind(("127.0.0.1", int(first)))
    assert dict(os.environ) == before
    monkeypatch.setenv(port, "7001")
    with transfer.environment(args, duty):
        assert os.environ[port] == "7001"
    nowhere = Duty(role="decode", host="192.0.2.77")
    monkeypatch.delenv(port)
    with pytest.raises(EngineError, match=r"cannot listen on 192\.0\.2\.77"), transfer.environment(args, nowhere):
        pass
