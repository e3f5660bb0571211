"""A tritonserver on a repository of one entry, its engine made as in `worker_process.py`.

`worker_runner.Worker` starts it with a worker's options as JSON, which become the entry's `1/model.json`; or with
`repository`, which is one already, and the address of Redis.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from worker_runner import MODEL

from dynamo_llm.cli.checks import check_ports
from dynamo_llm.config import resolve_model
from dynamo_llm.hosts.tritonserver.launcher import Settings, run

HERE = Path(__file__).parent


def make_entry(folder: Path, options: dict[str, Any], *, config: str = "", versions: Sequence[int] = (1,)) -> None:
    """An entry of a model repository; `config` is added to its config.pbtxt."""
    options = dict(options)
    model, name = resolve_model(options.pop("model_path", MODEL))
    entry = folder / options.pop("model_name", name)
    entry.mkdir()
    (entry / "config.pbtxt").write_text(f'backend: "dynamo_llm"\n{config}')
    for version in versions:
        (entry / str(version)).mkdir()
        (entry / str(version) / "model.json").write_bytes(msgspec.json.encode({"model": str(model), **options}))


def main(options: dict[str, Any]) -> int:
    ports = check_ports("127.0.0.1", {"http": 0, "grpc": 0, "metrics": 0})
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    with contextlib.ExitStack() as stack:
        repository = options.get("repository")
        if repository is None:
            repository = stack.enter_context(tempfile.TemporaryDirectory())
            make_entry(Path(repository), options)
        return run(
            Settings(
                repositories=[Path(repository)],
                http_port=ports[0],
                grpc_port=ports[1],
                metrics_port=ports[2],
                control_mode=options.get("control_mode", "explicit"),
                redis_url=options["redis_url"],
                model_file=HERE / "tritonserver_model.py",
            )
        )


if __name__ == "__main__":
    sys.exit(main(msgspec.json.decode(sys.argv[1], type=dict[str, Any])))
