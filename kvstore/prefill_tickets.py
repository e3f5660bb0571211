"""The prefill queue of a model: requests whose prompt the next prefill worker with room is to compute.

What waits is a *ticket*, not the prompt: a router draws one (`prefill_queue.PrefillQueue`), a worker with room claims
the oldest through a consumer group and calls its router (`prefill_caller.PrefillCaller`), and the router sends the
request to that worker the usual way. A ticket leaves the stream when its router takes the call or wants it no longer,
so that a cancelled one is never claimed. One whose call was lost, because its worker died or the router's subscription
was broken, is claimed again by whoever has room: a router may be called twice, and takes the first. Tickets of a router
that is gone run out.
"""

import msgspec
from msgspec import Struct
from redis.asyncio import Redis

from kvstore.connect import store_errors

GROUP = "prefill"
FIELD = b"t"
MOST_TICKETS = 10_000


class Ticket(Struct, frozen=True, array_like=True):
    """What stands in the stream."""

    router: str
    number: int
    """The router's own."""
    tokens: int
    """Of the prompt: for those who predict how long the queue takes."""
    ttl_ms: int
    """So long its router waits at most."""


class Call(Struct, frozen=True, array_like=True):
    """What a router is sent: this instance has room for that ticket."""

    number: int
    instance: str
    entry: bytes
    """Of the stream."""


encode = msgspec.msgpack.Encoder().encode
decode_ticket = msgspec.msgpack.Decoder(Ticket).decode
decode_call = msgspec.msgpack.Decoder(Call).decode


async def remove(redis: Redis, stream: str, entries: list[bytes]) -> None:
    """From the stream, and from what consumers have claimed. Raises `StoreError`."""
    with store_errors(redis):
        async with redis.pipeline(transaction=True) as pipe:
            pipe.xack(stream, GROUP, *entries)
            pipe.xdel(stream, *entries)
            await pipe.execute()


def ticket_of(fields: dict[bytes, bytes]) -> Ticket | None:
    """Of an entry; None where it is none."""
    try:
        return decode_ticket(fields.get(FIELD, b""))
    except msgspec.MsgspecError:
        return None
