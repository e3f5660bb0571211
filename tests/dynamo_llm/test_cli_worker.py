"""How `dynamo-llm worker` comes to its configuration."""

from pathlib import Path
from typing import Any

import pytest

from dynamo_llm.cli.errors import StartError
from dynamo_llm.cli.worker import worker_config
from dynamo_llm.config import WorkerConfig

NONE: dict[str, Any] = {"model_path": None, "grpc_port": None, "engine": None}


def _file(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "worker.toml"
    file.write_text(text)
    return file


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    """What no flag names is the file's, and what the file does not hold is the default."""
    file = _file(tmp_path, 'model = "/m"\ngrpc_port = 1\nlease_ttl = 4\n[engine_options]\nkv_blocks = 8\nthreads = 2\n')
    config = worker_config({**NONE, "grpc_port": 9}, ["threads=4", 'device="cpu"'], file)
    assert (config.model_path, config.grpc_port, config.lease_ttl_s) == ("/m", 9, 4)
    assert config.engine_options == {"kv_blocks": 8, "threads": 4, "device": "cpu"}
    assert config.host == WorkerConfig(model_path="/m").host


def test_engine_option_values_are_json_or_else_text(tmp_path: Path) -> None:
    """Numbers, booleans, lists and null are what JSON says; a bare word is a string; a value may hold `=`."""
    config = worker_config({"model_path": "/m"}, ["a=1", "b=true", "c=[1,2]", "d=null", "e=cpu", "f=x=y"], None)
    assert config.engine_options == {"a": 1, "b": True, "c": [1, 2], "d": None, "e": "cpu", "f": "x=y"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grpc_prot = 1", r"unknown option 'grpc_prot'; did you mean 'grpc_port'\?"),
        ('grpc_port = "x"', "grpc_port"),
        ("model = ", "is no TOML"),
        ("engine_options = 3", "engine_options must be a table"),
    ],
)
def test_a_wrong_file_gets_one_line_that_names_it(text: str, message: str, tmp_path: Path) -> None:
    """An unknown key, a wrong type, or no TOML at all: the file and the reason, in one line."""
    file = _file(tmp_path, text)
    with pytest.raises(StartError, match=message) as error:
        worker_config({"model_path": "/m"}, [], file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """`--config` of a file that is not there."""
    with pytest.raises(StartError, match=r"nothing\.toml: No such file"):
        worker_config({}, [], tmp_path / "nothing.toml")


def test_a_worker_needs_a_model() -> None:
    """Neither flag nor file: the line says what to pass."""
    with pytest.raises(StartError, match="pass --model DIR"):
        worker_config(NONE, [], None)


@pytest.mark.parametrize("pair", ["threads", "=4", "a b=1"])
def test_an_engine_option_without_key_or_value_is_refused(pair: str) -> None:
    """It has to be KEY=VALUE."""
    with pytest.raises(StartError, match="KEY=VALUE"):
        worker_config({"model_path": "/m"}, [pair], None)
