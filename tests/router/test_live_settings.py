"""Settings of the registry over those that the router was started with."""

import logging
from typing import Any

import pytest

from kvstore.watch import SettingChanged
from router.config import DisaggSettings
from router.live_settings import LiveSettings


def test_a_setting_is_taken_over_and_given_back() -> None:
    """A deleted setting is the router's own default again, and the others stay."""
    live = LiveSettings(DisaggSettings(max_local_prefill_tokens=7, itl_weight=2.0))
    live.on_change(SettingChanged("max_local_prefill_tokens", 99))
    live.on_change(SettingChanged("remote_prefill", "never"))
    assert live.current == DisaggSettings(max_local_prefill_tokens=99, itl_weight=2.0, remote_prefill="never")
    live.on_change(SettingChanged("max_local_prefill_tokens", None))
    assert live.current == DisaggSettings(max_local_prefill_tokens=7, itl_weight=2.0, remote_prefill="never")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_local_prefill_tokens", -1),
        ("max_local_prefill_tokens", 1.5),
        ("max_local_prefill_tokens", "many"),
        ("max_local_prefill_tokens", True),
        ("remote_prefill", "sometimes"),
        ("transfer_tokens_per_s", 0),
        ("prefill_timeout_s", [1]),
        ("prefill_attempts", {}),
        ("itl_weight", "x" * 4000),
    ],
)
def test_a_broken_value_changes_nothing(name: str, value: Any, caplog: pytest.LogCaptureFixture) -> None:
    """What went before stays in force, and one line names the setting."""
    live = LiveSettings(DisaggSettings())
    with caplog.at_level(logging.WARNING):
        live.on_change(SettingChanged(name, value))
    assert live.current == DisaggSettings()
    (record,) = caplog.records
    assert name in record.getMessage()
    assert len(record.getMessage().splitlines()) == 1
    assert len(record.getMessage()) < 300


def test_settings_of_others_are_ignored(caplog: pytest.LogCaptureFixture) -> None:
    """The registry's settings are not the router's alone."""
    live = LiveSettings(DisaggSettings())
    live.on_change(SettingChanged("autoscale", 3))
    assert live.current == DisaggSettings()
    assert not caplog.records
