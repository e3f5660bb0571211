"""What an operator's config.pbtxt, model.json and the server's own flags make of a worker's options."""

import json
from pathlib import Path
from typing import Any

import pytest

from dynamo_llm.config import ConfigError, WorkerConfig
from dynamo_llm.hosts.tritonserver.options import REDIS_VARIABLE, flags_of, read
from dynamo_llm.hosts.tritonserver.place import Place, place_of


@pytest.fixture(autouse=True)
def _no_redis_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(REDIS_VARIABLE, raising=False)


def options(folder: Path, file: dict[str, Any] | None = None, server: dict[str, str] | None = None, **parameters: str):
    if file is not None:
        (folder / "model.json").write_text(json.dumps(file))
    return read("m", folder, parameters, server or {})


def test_nothing_said_is_enough(tmp_path: Path) -> None:
    """The model lies in `model`, the server has Triton's ports."""
    config = options(tmp_path)
    assert config == WorkerConfig(
        model_path=str(tmp_path / "model"),
        model_name="m",
        host="0.0.0.0",
        http_port=8000,
        grpc_port=8001,
        metrics_port=8002,
    )


def test_who_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters over the file, the environment's Redis over both, and either over the server's flags; a parameter is a
    string, also where a number or an object is meant; capitals are the python backend's."""
    monkeypatch.setenv(REDIS_VARIABLE, "redis://there")
    config = options(
        tmp_path,
        {"model": "/m", "engine": "mock", "namespace": "file", "redis": "redis://file", "lease_ttl": 5},
        {"grpc-port": "1", "http-port": "2", "grpc-address": "10.0.0.1"},
        namespace="parameter",
        http_port="3",
        engine_options='{"kv_blocks": 7}',
        EXECUTION_ENV_PATH="/env",
    )
    assert (config.model_path, config.engine, config.namespace) == ("/m", "mock", "parameter")
    assert (config.redis_url, config.lease_ttl_s) == ("redis://there", 5.0)
    assert (config.host, config.grpc_port, config.http_port, config.metrics_port) == ("10.0.0.1", 1, 3, 8002)
    assert config.engine_options == {"kv_blocks": 7}


@pytest.mark.parametrize(
    ("file", "parameters", "text"),
    [
        ({"model": 5}, {}, "model must be a text"),
        ({"engine_options": "[" * 100_000}, {}, "engine_options"),
        ({}, {"engine_options": "[" * 100_000}, "engine_options is no JSON"),
        ({"engin": "mock"}, {}, "unknown option 'engin'; did you mean 'engine'?"),
        ({}, {"max_inflight": "many"}, "max_inflight"),
        ({}, {"engine_options": "{"}, "the parameter engine_options is no JSON"),
        ([1], {}, "model.json must hold an object"),
        ({}, {"instances": "2"}, "instances cannot be set on a tritonserver: load the model under several names"),
        ({}, {"role": "cook"}, "role"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, file: Any, parameters: dict[str, str], text: str) -> None:
    """In one line."""
    with pytest.raises(ConfigError, match=text.replace("?", r"\?")) as caught:
        options(tmp_path, file, **parameters)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_json(tmp_path: Path) -> None:
    """Is told by its name."""
    for garbage in (b"\xff{", b"[" * 100_000):
        (tmp_path / "model.json").write_bytes(garbage)
        with pytest.raises(ConfigError, match=r"model\.json cannot be read"):
            options(tmp_path)


def test_a_port_that_is_none(tmp_path: Path) -> None:
    """Of the server's own flags; Triton itself would not have started with it."""
    with pytest.raises(ConfigError, match="--grpc-port=x of the tritonserver is no port"):
        options(tmp_path, server={"grpc-port": "x"})


def test_flags_of_a_server() -> None:
    """Both ways of writing them; the last one wins, as with Triton."""
    command = b"tritonserver\0--http-port=1\0--grpc-port\x002\0--exit-on-error\0--http-port=3\0"
    assert flags_of(command) == {"http-port": "3", "grpc-port": "2", "exit-on-error": ""}


# --- place ------------------------------------------------------------------------------------------------------------


def arguments(entry: Path, version: str, **config: Any) -> dict[str, str]:
    return {
        "model_name": "m",
        "model_version": version,
        "model_repository": str(entry),
        "model_config": json.dumps({"parameters": {"engine": {"string_value": "mock"}}, **config}),
    }


@pytest.mark.parametrize(
    ("policy", "version", "name", "served_as"),
    [
        ({}, "1", "m", "m.1"),
        ({}, "12", "m.12", "m"),
        ({"specific": {"versions": ["1", "3"]}}, "3", "m.3", "m"),
        ({"specific": {"versions": ["1"]}}, "1", "m", "m"),
    ],
)
def test_names_of_a_version(tmp_path: Path, policy: Any, version: str, name: str, served_as: str) -> None:
    """The first one's companions need no number; clients of a router know the newest that is served by the model's."""
    for number in ("1", "3", "12", "train"):
        (tmp_path / number).mkdir()
    place = place_of(arguments(tmp_path, version, version_policy=policy))
    assert (place.name, place.served_as) == (name, served_as)
    assert place.folder == tmp_path / version
    assert place.parameters == {"engine": "mock"}


@pytest.mark.parametrize("group", [{"count": 2}, {"count": 1, "gpus": [0, 1]}])
def test_one_engine_serves_a_model(tmp_path: Path, group: Any) -> None:
    """More instances would be more engines under one name."""
    with pytest.raises(ConfigError, match="instance_group must be"):
        place_of(arguments(tmp_path, "1", instance_group=[group]))


@pytest.mark.parametrize(
    ("flags", "address", "explicit"),
    [
        ({}, "127.0.0.1:8001", False),
        ({"grpc-address": "10.0.0.1", "grpc-port": "9", "model-control-mode": "explicit"}, "10.0.0.1:9", True),
    ],
)
def test_the_server_around_it(tmp_path: Path, flags: dict[str, str], address: str, explicit: bool) -> None:
    """As its flags say."""
    place = Place("m", "1", tmp_path, {}, {}, 1, flags)
    assert (place.grpc_address, place.explicit) == (address, explicit)
