"""What every host refuses before it starts a server."""

import pytest

from dynamo_llm.hosts.base import HostError, refuse_numpy_2


def test_numpy_2_is_refused_in_one_line() -> None:
    """The line says what to install, and where an engine that needs it can live."""
    with pytest.raises(HostError, match=r"numpy 2\.3\.5 kills .*'numpy<2'.*`python`") as caught:
        refuse_numpy_2("2.3.5")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", ["1.26.4", "1.24.0rc1"])
def test_numpy_1_is_taken(version: str) -> None:
    """It is what PyTriton asks for."""
    refuse_numpy_2(version)
