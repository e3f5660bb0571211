"""Options of a worker, and where a model is found."""

from pathlib import Path

import pytest

from dynamo_llm.config import ConfigError, WorkerConfig, resolve_model


def test_only_the_model_is_required() -> None:
    """Everything else has a default that serves on the loopback address."""
    config = WorkerConfig.from_dict({"model_path": "m"})
    assert config == WorkerConfig(model_path="m")
    assert (config.engine, config.role, config.host, config.grpc_port) == ("torch", "agg", "127.0.0.1", 0)


def test_an_unknown_option_names_the_nearest() -> None:
    """A typing error is not dropped in silence."""
    with pytest.raises(ConfigError, match="unknown option 'drain_timeout'; did you mean 'drain_timeout_s'"):
        WorkerConfig.from_dict({"model_path": "m", "drain_timeout": 3})


@pytest.mark.parametrize(
    "values",
    [{}, {"grpc_port": 70000}, {"lease_ttl_s": 0}, {"role": "both"}, {"max_inflight": 0}, {"engine_options": 3}],
)
def test_wrong_values_are_one_line(values: dict[str, object]) -> None:
    """The type's and the bounds' violations come out as the same error."""
    base = {"model_path": "m"} if values else {}
    with pytest.raises(ConfigError) as caught:
        WorkerConfig.from_dict({**base, **values})
    assert "\n" not in str(caught.value)


def test_a_hugging_face_folder_is_itself(tmp_path: Path) -> None:
    """Its name is the model's unless another is given."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert resolve_model(str(folder)) == (folder, "tiny")
    assert resolve_model(str(folder), "other") == (folder, "other")


def test_a_repository_entry_holds_it_below_its_version(tmp_path: Path) -> None:
    """The highest version that has a model counts, by number."""
    for version in ("2", "10", "11", "notes"):
        (tmp_path / "demo" / version / "model").mkdir(parents=True)
    for version in ("2", "10"):
        (tmp_path / "demo" / version / "model" / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path / "demo")) == (tmp_path / "demo/10/model", "demo")


@pytest.mark.parametrize(
    ("path", "name", "message"),
    [
        ("none", "", "does not exist"),
        ("", "", "neither config.json"),
        ("m", "a b", "cannot"),
        ("m", "x" * 49, "cannot"),
    ],
)
def test_what_is_no_model_is_one_line(tmp_path: Path, path: str, name: str, message: str) -> None:
    """Missing folders, folders of something else, and names that no server takes."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text("{}")
    with pytest.raises(ConfigError, match=message):
        resolve_model(str(tmp_path / path), name)


@pytest.mark.parametrize("host", ["::", "::1"])
def test_an_ipv6_address_is_refused(host: str) -> None:
    """In one line, before anything starts: the server of the metrics has no IPv6."""
    with pytest.raises(ConfigError, match="IPv4 only"):
        WorkerConfig.from_dict({"model_path": "/m", "host": host})
