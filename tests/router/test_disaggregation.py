"""Where a prompt is computed is a pure function: its reasons by hand, and what must hold for all inputs."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.config import DisaggSettings
from router.disaggregation import Side, decide, side_of
from router.placement import Candidate

AUTO = DisaggSettings(max_local_prefill_tokens=100, transfer_overhead_ms=5.0)
FAST = 50_000.0


def side(
    uncached: int = 1000, queued: float = 0.0, requests: int = 0, rate: float = 1000.0, step: float = 10.0
) -> Side:
    return Side(
        uncached_tokens=uncached,
        queued_tokens=queued,
        requests=requests,
        prefill_tokens_per_s=rate,
        decode_step_ms=step,
    )


sides = st.builds(
    side,
    uncached=st.integers(1, 100_000),
    queued=st.floats(0, 1e6),
    requests=st.integers(0, 200),
    rate=st.just(0.0) | st.floats(1, 1e6),
    step=st.floats(0, 1000),
)
rates = st.floats(1, 1e9)
policies = st.builds(
    DisaggSettings,
    remote_prefill=st.sampled_from(["auto", "always", "never"]),
    max_local_prefill_tokens=st.integers(0, 10_000),
    itl_weight=st.floats(0, 100),
    max_itl_ms=st.just(0.0) | st.floats(1, 1000),
    transfer_overhead_ms=st.floats(0, 1000),
)


def test_the_predictions() -> None:
    """Queue, computation, transfer of what the decode worker lacks and one decode step, at the measured speeds."""
    local = side(uncached=1000, queued=500, rate=2000.0, step=8.0)
    remote = side(uncached=600, queued=200, rate=4000.0)
    verdict = decide(local, remote, 10_000.0, AUTO)
    assert verdict.local_ttft_ms == pytest.approx(250 + 500 + 8)
    assert verdict.remote_ttft_ms == pytest.approx(200 + 100 + 5 + 8)


@pytest.mark.parametrize(
    ("local", "remote", "changes", "reason"),
    [
        (side(), side(), {"remote_prefill": "never"}, "never"),
        (side(uncached=100), side(), {}, "short"),
        (side(uncached=100), side(), {"remote_prefill": "always"}, "short"),
        (side(), None, {}, "no_prefill_worker"),
        (side(), None, {"remote_prefill": "always"}, "no_prefill_worker"),
        (side(), side(queued=5000), {}, "sooner"),
        (side(requests=3), side(queued=4000), {}, "sooner"),
        (side(requests=5), side(queued=4000), {}, "cheaper"),
        (side(requests=5), side(queued=4000), {"itl_weight": 0.0}, "sooner"),
        (side(), side(), {}, "cheaper"),
        (side(), side(), {"itl_weight": 0.0}, "sooner"),
        (side(queued=5000), side(), {"itl_weight": 0.0}, "cheaper"),
        (side(), side(queued=5000), {"remote_prefill": "always"}, "always"),
        (side(requests=1, step=21.0), side(queued=50_000), {"max_itl_ms": 20.0}, "itl"),
        (side(requests=0, step=21.0), side(queued=50_000), {"max_itl_ms": 20.0}, "sooner"),
        (side(20, requests=1), side(queued=50_000), {"max_itl_ms": 29.0, "max_local_prefill_tokens": 10}, "itl"),
        (side(20, requests=1), side(queued=50_000), {"max_itl_ms": 31.0, "max_local_prefill_tokens": 10}, "sooner"),
        (side(rate=0.0), side(rate=0.0), {}, "cheaper"),
        (side(rate=0.0), side(rate=0.0, queued=5000), {}, "sooner"),
    ],
)
def test_reasons(local: Side, remote: Side | None, changes: dict[str, object], reason: str) -> None:
    """Each rule, and the rule that goes before it."""
    verdict = decide(local, remote, FAST, msgspec.structs.replace(AUTO, **changes))
    assert (verdict.reason, verdict.remote) == (reason, reason in ("cheaper", "always", "itl"))


def test_an_unknown_speed_is_the_other_ones() -> None:
    """A worker without a measured speed is taken to be as fast as the other; with none known nothing is predicted."""
    known = decide(side(rate=500.0), side(rate=500.0), FAST, AUTO)
    assert decide(side(rate=0.0), side(rate=500.0), FAST, AUTO) == known
    assert decide(side(rate=500.0), side(rate=0.0), FAST, AUTO) == known
    unknown = decide(side(rate=0.0), side(rate=0.0), FAST, AUTO)
    assert (unknown.local_ttft_ms, unknown.remote_ttft_ms) == (None, None)


def test_what_is_cached_is_not_computed() -> None:
    """Blocks of every tier count as cached, and of a prompt held whole the last token is still to be computed."""
    candidate = Candidate("a", 4, 3, 2, prefill_blocks=10, requests=7, prefill_tokens_per_s=5.0, decode_step_ms=6.0)
    assert side_of(candidate, 200, 16) == side(200 - 9 * 16, 160.0, 7, 5.0, 6.0)
    assert side_of(candidate, 9 * 16, 16).uncached_tokens == 1


@given(local=sides, remote=st.none() | sides, rate=rates, settings=policies)
def test_limits_hold(local: Side, remote: Side | None, rate: float, settings: DisaggSettings) -> None:
    """Nothing goes to a prefill worker that is short, forbidden, or has none to go to; the verdict is repeatable."""
    verdict = decide(local, remote, rate, settings)
    assert verdict == decide(local, remote, rate, settings)
    short = local.uncached_tokens <= settings.max_local_prefill_tokens
    if remote is None or settings.remote_prefill == "never" or short:
        assert not verdict.remote
    elif settings.remote_prefill == "always":
        assert verdict.remote


@given(local=sides, remote=sides, rate=rates, settings=policies, more=st.floats(1, 1e6))
def test_a_longer_queue_never_draws(
    local: Side, remote: Side, rate: float, settings: DisaggSettings, more: float
) -> None:
    """A side that gets more to do, and nothing else, is not chosen for it."""
    before = decide(local, remote, rate, settings)
    busier_remote = msgspec.structs.replace(remote, queued_tokens=remote.queued_tokens + more)
    busier_local = msgspec.structs.replace(local, queued_tokens=local.queued_tokens + more)
    if not before.remote:
        assert not decide(local, busier_remote, rate, settings).remote
    else:
        assert decide(busier_local, remote, rate, settings).remote


@given(local=sides, remote=sides, rate=rates, settings=policies, more=st.integers(1, 100))
def test_more_running_sequences_never_draw(
    local: Side, remote: Side, rate: float, settings: DisaggSettings, more: int
) -> None:
    """The more sequences a local prefill would hold up, the sooner it goes elsewhere; the faster the transfer, too."""
    if decide(local, remote, rate, settings).remote:
        assert decide(msgspec.structs.replace(local, requests=local.requests + more), remote, rate, settings).remote
        assert decide(local, remote, 2 * rate, settings).remote


@given(local=sides, remote=sides, rate=rates, settings=policies)
def test_without_a_weight_the_sooner_one_wins(local: Side, remote: Side, rate: float, settings: DisaggSettings) -> None:
    """With `itl_weight` 0 and no limit the two predictions alone decide."""
    settings = msgspec.structs.replace(
        settings, remote_prefill="auto", max_local_prefill_tokens=0, itl_weight=0.0, max_itl_ms=0.0
    )
    verdict = decide(local, remote, rate, settings)
    if verdict.local_ttft_ms is not None and verdict.remote_ttft_ms is not None:
        assert verdict.remote == (verdict.remote_ttft_ms < verdict.local_ttft_ms)
