"""The table of pins, in made-up time."""

import random

import pytest

from dynamo_llm.transfer.errors import TransferError
from dynamo_llm.transfer.pins import PinTable


def test_random_lives_keep_the_books() -> None:
    """Thousands of pins that are added, removed and expire: slots, blocks and leases agree with a plain dict."""
    rng, table = random.Random(1), PinTable(16)
    model: dict[str, tuple[int, int, float, int]] = {}
    now_s = 0.0
    for step in range(5000):
        now_s += rng.random()
        action = rng.random()
        if action < 0.6:
            expires_s = now_s + rng.choice([1, 5, 100])
            if len(model) == 16:
                with pytest.raises(TransferError, match="16 requests have pinned"):
                    table.add(str(step), [1], step, expires_s)
            else:
                pin = table.add(str(step), range(step % 5), step, expires_s)
                model[pin.request_id] = (pin.slot, step, expires_s, step % 5)
        elif model and action < 0.8:
            gone = rng.choice(list(model))
            assert table.remove(gone) is not None
            assert table.remove(gone) is None
            del model[gone]
        else:
            expired = [table.remove(pin.request_id) for pin in table.expired(now_s)]
            over = {name for name, entry in model.items() if entry[2] <= now_s}
            assert {pin.request_id for pin in expired if pin} == over
            for name in over:
                del model[name]
        assert len(table) == len(model)
        assert table.blocks == sum(entry[3] for entry in model.values())
        assert len({entry[0] for entry in model.values()}) == len(model)
        for name, (slot, stamp, _, _) in model.items():
            found = table.find(slot, stamp)
            assert found is not None
            assert found.request_id == name
            assert table.find(slot, stamp + 1) is None
        assert table.next_expiry_s() == min((entry[2] for entry in model.values()), default=None)


def test_pins_that_are_gone_take_no_room() -> None:
    """However long their leases would have been: the list of expiries stays short."""
    table = PinTable(4)
    for number in range(10_000):
        table.add(str(number), [1], 1, 1e9 + number)
        table.remove(str(number))
    assert len(table._expiries) < 100


def test_pins_of_a_reader() -> None:
    """Only those that it has claimed."""
    table = PinTable(4)
    pins = [table.add(name, [1], 5, 10.0) for name in "abc"]
    pins[0].reader = pins[2].reader = "r"
    assert table.of_reader("r") == [pins[0], pins[2]]
    assert table.of_reader("s") == []
