"""Serves the models on a plain tritonserver: Triton's python backend loads `../../model.py`, which calls what is here.

Four Triton models make one instance, each in a stub process of its own:

- `M` (`worker_model.py`): the engine, its service, the public model. It has the instance's place in the registry, and
  loads the others (docs/triton.md says how they come where Triton does not let it).
- `M.control`, `M.session` and `M.trtllm` (`companions.py`): they hand on to `M` what routers, and clients of the other
  dialect, send, over a local socket (`link.py`). `companion_models.py` has Triton load them.

`launcher.py` runs the tritonserver that PyTriton carries, for `dynamo-llm tritonserver`. Nothing here imports Triton's
module for Python models: `model.py` passes it in.
"""

import json
from typing import TYPE_CHECKING, Any, Protocol

from dynamo_llm.hosts.tritonserver.model_config import COMPANION_OF, complete, parameter

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
    return complete(config)


def open_model(arguments: dict[str, str], triton: Any, create: "CreateEngine | None" = None) -> TritonModel:
    """The model that Triton loads: `M` itself, or a companion of it. Raises Triton's own exception with one line.

    `triton` is the module `triton_python_backend_utils`; `create` makes the engine, else the options name it.
    """
    owner = parameter(json.loads(arguments["model_config"]), COMPANION_OF)
    if owner:
        from dynamo_llm.hosts.tritonserver.companions import open_companion

        return open_companion(arguments["model_name"], owner, triton)
    from dynamo_llm.hosts.tritonserver.worker_model import open_worker  # torch may come with it

    return open_worker(arguments, triton, create)
