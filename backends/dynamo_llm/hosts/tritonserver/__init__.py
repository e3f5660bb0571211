"""Serves the models on a plain tritonserver: Triton's python backend loads `../../model.py`, which calls what is here.

Three Triton models make one instance, each in a stub process of its own:

- `M` (`worker_model.py`): the engine, its service, the public model. It has the instance's place in the registry, and
  loads the other two (docs/triton.md says how they come where Triton does not let it).
- `M.control` and `M.session` (`companions.py`): they hand on to `M` what routers send, over a local socket (`link.py`).

`launcher.py` runs the tritonserver that PyTriton carries, for `dynamo-llm tritonserver`. Nothing here imports Triton's
module for Python models: `model.py` passes it in.
"""

from typing import TYPE_CHECKING, Any, Protocol

from kvstore.wire import CONTROL_SUFFIX, SESSION_SUFFIX

if TYPE_CHECKING:
    from dynamo_llm.instance import CreateEngine


class TritonModel(Protocol):
    """What Triton calls of a loaded model, on the stub's main thread."""

    def execute(self, requests: list[Any]) -> list[Any] | None: ...

    def is_ready(self) -> bool:
        """Asked by newer Tritons than 2.51."""
        ...

    def close(self) -> None: ...


def auto_complete(config: Any) -> Any:
    """Tensors and transaction policy of the model that an operator's few lines name."""
    from dynamo_llm.hosts.tritonserver.model_config import complete

    return complete(config)


def open_model(arguments: dict[str, str], triton: Any, create: "CreateEngine | None" = None) -> TritonModel:
    """The model that Triton loads: `M` itself, or a companion of it by its name. Raises Triton's own exception with one
    line. `triton` is the module `triton_python_backend_utils`; `create` makes the engine, else the options name it."""
    name = arguments["model_name"]
    for suffix in (CONTROL_SUFFIX, SESSION_SUFFIX):
        if name.endswith(suffix):
            from dynamo_llm.hosts.tritonserver import companions

            return companions.open_companion(name, suffix, triton)
    from dynamo_llm.hosts.tritonserver.worker_model import open_worker  # torch may come with it

    return open_worker(arguments, triton, create)
