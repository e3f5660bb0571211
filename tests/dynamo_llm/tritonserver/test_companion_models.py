"""When an instance's companions are loaded and unloaded, over a server that answers as the test wants."""

import asyncio
import threading
from typing import Any

from dynamo_llm.hosts.tritonserver.companion_models import CompanionModels
from dynamo_llm.hosts.tritonserver.repository import RepositoryError

CONFIG = {"backend": "dynamo_llm"}


class Server:
    """A `Repository` without a server."""

    def __init__(self) -> None:
        self.models: set[str] = set()
        self.failures = 0
        """So many loads fail."""
        self.asked = threading.Event()
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def is_ready(self, model: str, version: str = "") -> bool:
        return model in self.models

    def load(self, model: str, config: dict[str, Any]) -> None:
        assert config == CONFIG
        self.asked.set()
        assert self.may_go_on.wait(20)
        if self.failures:
            self.failures -= 1
            raise RepositoryError("no memory")
        self.models.add(model)

    def unload(self, model: str) -> None:
        if model not in self.models:
            raise RepositoryError("it is not loaded")
        self.models.remove(model)


def companions(server: Server, said: list[str], config: dict[str, Any] | None = CONFIG) -> CompanionModels:
    return CompanionModels(server, ["m.control", "m.session"], ["m.trtllm"], config, said.append)  # type: ignore[arg-type]


async def test_all_are_loaded_and_unloaded() -> None:
    """Also one that was there before, from the same model before it was loaded again."""
    server, said = Server(), []
    server.models.add("m.control")
    models = companions(server, said)
    await models.ready()
    assert server.models == {"m.control", "m.session", "m.trtllm"}
    await models.unload()
    assert (server.models, said) == (set(), [])


async def test_a_load_that_fails_is_tried_again() -> None:
    """The operator is told once for each model."""
    server, said = Server(), []
    server.failures = 7
    await companions(server, said).ready()
    assert {"m.control", "m.session"} <= server.models
    assert sorted(said) == [f"m.{name} cannot be loaded: no memory" for name in ("control", "session", "trtllm")]


async def test_an_unload_waits_for_loads() -> None:
    """The instance goes while its companions come: none is left behind."""
    server = Server()
    server.may_go_on.clear()
    models = companions(server, [])
    ready = asyncio.create_task(models.ready())
    await asyncio.to_thread(server.asked.wait, 20)
    ready.cancel()
    await asyncio.wait([ready])
    unloaded = asyncio.create_task(models.unload())
    await asyncio.sleep(0)
    assert not unloaded.done()
    server.may_go_on.set()
    await unloaded
    assert server.models == set()


async def test_where_nobody_may_load_those_for_routers_are_awaited(eventually: Any) -> None:
    """The third one is not."""
    server = Server()
    ready = asyncio.create_task(companions(server, [], config=None).ready())
    server.models.add("m.control")
    await asyncio.sleep(0)
    assert not ready.done()
    server.models.add("m.session")
    await eventually(ready.done)
    await ready
    assert server.models == {"m.control", "m.session"}
