"""Keys: all under the prefix, apart from each other, and hash-tagged for Redis Cluster."""

import pytest

from kvstore.errors import StoreConfigError
from kvstore.keys import Keys


def test_prefix_and_tags() -> None:
    """Each key begins with the prefix; what one script touches shares a tag, whatever the model is called."""
    keys = Keys("p", "ns")
    names = [keys.instances(), keys.instance("a"), keys.era(), keys.blob("0"), keys.settings(), keys.changes()]
    model = [keys.events("m/{x}", 16), keys.index("m/{x}", 16), keys.index_writer("m/{x}", 16)]
    model += [
        keys.prefill_queue("m/{x}", 16),
        keys.prefill_calls("m/{x}", 16, "r1"),
        keys.prefill_calls("m/{x}", 16, "r2"),
    ]
    assert len(set(names + model)) == len(names + model)
    assert all(name.startswith("p:{ns}:") for name in names)
    assert all(name.startswith("p:{ns/m%2F%7Bx%7D/16}:") for name in model)
    assert keys.events("m", 16) != keys.events("m", 32) != keys.events("n", 32)


@pytest.mark.parametrize("values", [("", "ns"), ("p", "a:b"), ("p", "{x}"), ("p q", "ns"), ("p", "x" * 65)])
def test_unfit_names(values: tuple[str, str]) -> None:
    """A prefix or namespace that would break the scheme is refused."""
    with pytest.raises(StoreConfigError, match="may hold"):
        Keys(*values)
