"""`dynamo-llm role`: give a worker that serves another role. Asks the worker itself, by the address on its card."""

import asyncio
import time
from typing import Annotated, Any, get_args

import grpc
import typer
from tritonclient.grpc import service_pb2, service_pb2_grpc

from dynamo_llm.cli.errors import CommandError
from dynamo_llm.config import WorkerConfig
from kvstore import wire
from kvstore.cards import InstanceCard, Role
from kvstore.connect import connect
from kvstore.errors import StoreError
from kvstore.keys import Keys
from kvstore.registry import Registry

EPILOG = """[bold]Examples[/bold]

  dynamo-llm status

  dynamo-llm role 5f0c2e decode

What is in flight goes on. Exit code 1, with one line on stderr, where the worker does not take the role.
"""

_DEFAULT = WorkerConfig(model_path="")
_POLL_S = 0.05


def role(
    instance: Annotated[
        str, typer.Argument(help="The worker's instance, as `status` shows it; its beginning will do.")
    ],
    role: Annotated[str, typer.Argument(help="agg, prefill or decode.", metavar="ROLE")],
    redis: Annotated[
        str, typer.Option(help="redis://, rediss:// or unix:// URL.", metavar="URL", envvar="DYNAMO_LLM_REDIS")
    ] = _DEFAULT.redis_url,
    namespace: Annotated[str, typer.Option(help="Where the worker registers.")] = _DEFAULT.namespace,
    timeout: Annotated[float, typer.Option(help="Seconds to wait until the worker has it.", min=0.1)] = 30.0,
) -> None:
    """Change the role of a worker while requests flow: agg, prefill or decode."""
    if role not in get_args(Role):
        raise CommandError(f"no such role: {role}; there are {', '.join(get_args(Role))}")
    try:
        card = asyncio.run(_change(instance, role, redis, Keys(_DEFAULT.key_prefix, namespace), timeout))
    except StoreError as error:
        raise CommandError(f"{error}: is --redis right?") from None
    typer.echo(f"{card.instance} of {card.model} has the role {card.role}")


async def _change(instance: str, role: Any, redis_url: str, keys: Keys, timeout_s: float) -> InstanceCard:
    """The card that says so. Raises `CommandError` or `StoreError`."""
    deadline_s = time.monotonic() + timeout_s
    async with connect(redis_url) as redis:
        registry = Registry(redis, keys)
        card = _the_one(instance, await registry.instances())
        await _tell(card, role, timeout_s)
        while card.role != role:
            if time.monotonic() > deadline_s:
                raise CommandError(f"{card.instance} has not taken the role in {timeout_s:g} s: its log says why")
            await asyncio.sleep(_POLL_S)
            card = _the_one(card.instance, await registry.instances())
        return card


def _the_one(beginning: str, cards: list[InstanceCard]) -> InstanceCard:
    found = [card for card in cards if card.instance.startswith(beginning)]
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} instances begin" if found else "no instance begins"
    known = ", ".join(f"{card.instance} ({card.role})" for card in found or cards) or "none"
    raise CommandError(f"{what} with {beginning!r}; registered are: {known}")


async def _tell(card: InstanceCard, role: Any, timeout_s: float) -> None:
    payload = wire.encode(wire.ControlBatch("", [wire.SetRole(role)]))
    asked = service_pb2.ModelInferRequest(model_name=(card.triton_model or card.model) + wire.CONTROL_SUFFIX)
    asked.inputs.add(name=wire.PAYLOAD, datatype="UINT8", shape=[len(payload)])
    asked.raw_input_contents.append(payload)
    async with grpc.aio.insecure_channel(card.grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            answer = await stub.ModelInfer(asked, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            where = f"{card.instance} at {card.grpc_address}"
            raise CommandError(f"{where} does not answer: {error.details() or error.code().name}") from None
    (reply,) = wire.decode_reply(answer.raw_output_contents[0]).replies
    if isinstance(reply, wire.Refused):
        raise CommandError(f"{card.instance} refuses: {reply.error.message}")
