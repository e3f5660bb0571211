"""Records what our adapters use of a package's API from its source, without importing it: names and signatures only.

    python tests/dynamo_llm/record_api.py sglang 0.5.23 FOLDER > tests/.../recorded_sglang_0.5.23.json
    python tests/dynamo_llm/record_api.py tensorrt_llm 1.2.1 FOLDER "where it is from" > …

FOLDER holds the package's own folder: an unpacked wheel, a source tree, or as much of one as is recorded.

`recorded_api.py` builds a package from the recording that refuses every call which the real one would refuse.
"""

import ast
import json
import sys
from pathlib import Path
from typing import Any

SPECS: dict[str, dict[str, list[str]]] = {
    "sglang": {
        "functions": [
            "sglang/srt/entrypoints/engine.py:Engine.__init__",
            "sglang/srt/entrypoints/engine.py:Engine.async_generate",
            "sglang/srt/entrypoints/engine.py:Engine.get_all_child_pids",
            "sglang/srt/entrypoints/engine.py:Engine.shutdown",
            "sglang/srt/managers/tokenizer_manager.py:TokenizerManager.abort_request",
            "sglang/srt/managers/tokenizer_control_mixin.py:TokenizerControlMixin.get_loads",
            "sglang/srt/server_args.py:ServerArgs.resolved_dict",
        ],
        "fields": [
            "sglang/srt/arg_groups/fields/*.py:ServerArgs",
            "sglang/srt/sampling/sampling_params.py:SamplingParams",
            "sglang/srt/managers/load_snapshot.py:LoadSnapshot",
            "sglang/srt/disaggregation/kv_events.py:KVEventsConfig",
            "sglang/srt/disaggregation/kv_events.py:BlockStored",
            "sglang/srt/disaggregation/kv_events.py:BlockRemoved",
        ],
        "attributes": [
            "sglang/srt/entrypoints/engine.py:Engine:server_args,tokenizer_manager",
            "sglang/srt/managers/tokenizer_manager.py:TokenizerManager:_subprocess_watchdog,model_config",
            "sglang/srt/configs/model_config.py:ModelConfig:context_len,vocab_size,hf_eos_token_id",
        ],
    },
    "tensorrt_llm": {
        "functions": [
            "tensorrt_llm/llmapi/llm.py:BaseLLM.__init__",
            "tensorrt_llm/llmapi/llm.py:BaseLLM.generate_async",
            "tensorrt_llm/llmapi/llm.py:BaseLLM.get_kv_cache_events_async",
            "tensorrt_llm/llmapi/llm.py:BaseLLM.get_stats_async",
            "tensorrt_llm/llmapi/llm.py:BaseLLM.shutdown",
            "tensorrt_llm/llmapi/llm.py:BaseLLM._check_health",
            "tensorrt_llm/executor/result.py:GenerationResult.abort",
            "tensorrt_llm/executor/result.py:IterationResult.mark_undone",
        ],
        "fields": [
            "tensorrt_llm/sampling_params.py:SamplingParams",
            "tensorrt_llm/sampling_params.py:GuidedDecodingParams",
            "tensorrt_llm/disaggregated_params.py:DisaggregatedParams",
            "tensorrt_llm/executor/request.py:LoRARequest",
            "tensorrt_llm/executor/result.py:CompletionOutput",
            "tensorrt_llm/executor/result.py:Logprob",
            "tensorrt_llm/llmapi/llm_args.py:KvCacheConfig",
            "tensorrt_llm/llmapi/llm_args.py:BaseLlmArgs",
            "tensorrt_llm/llmapi/llm_args.py:TorchLlmArgs",
        ],
        "attributes": [
            "tensorrt_llm/llmapi/llm.py:BaseLLM:args",
            "tensorrt_llm/executor/result.py:GenerationResultBase:cached_tokens",
        ],
        "keys": [
            f"tensorrt_llm/_utils.py:KVCacheEventSerializer.{name}"
            for name in (
                "to_json_str",
                "_created_to_json",
                "_stored_to_json",
                "_stored_block_to_json",
                "_removed_to_json",
                "_updated_to_json",
                "_event_diff_to_json",
                "_unique_tokens_to_json",
            )
        ],
    },
}


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[list[Any]]:
    """[name, kind, has a default] of each parameter but `self`, in order; the kinds are those of `inspect`."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    first_default = len(positional) - len(arguments.defaults)
    found = [[arg.arg, "POSITIONAL_OR_KEYWORD", index >= first_default] for index, arg in enumerate(positional)]
    if arguments.vararg:
        found.append([arguments.vararg.arg, "VAR_POSITIONAL", False])
    for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append([arg.arg, "KEYWORD_ONLY", default is not None])
    if arguments.kwarg:
        found.append([arguments.kwarg.arg, "VAR_KEYWORD", False])
    return [entry for entry in found if entry[0] not in ("self", "cls")]


def _class(tree: ast.Module, name: str) -> ast.ClassDef:
    return next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)


def _fields(node: ast.ClassDef) -> list[str]:
    """Annotated names of a class body, public ones: dataclasses, structs and pydantic models declare fields so."""
    names = [
        item.target.id for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    ]
    return [name for name in names if not name.startswith("_")]


def _method(root: Path, entry: str) -> tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    """`PATH:CLASS.METHOD`, to `CLASS.METHOD` and its source."""
    path, _, name = entry.partition(":")
    owner, _, method = name.partition(".")
    node = _class(ast.parse((root / path).read_text()), owner)
    found = next(item for item in node.body if getattr(item, "name", "") == method)
    assert isinstance(found, (ast.FunctionDef, ast.AsyncFunctionDef))
    return name, found


def _keys(function: ast.AST) -> list[str]:
    """Of the maps that a function writes down, and of what it sets in them later."""
    nodes = list(ast.walk(function))
    written = [key for node in nodes if isinstance(node, ast.Dict) for key in node.keys]
    set_later = [node.slice for node in nodes if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)]
    return [str(key.value) for key in (*written, *set_later) if isinstance(key, ast.Constant)]


def record(package: str, version: str, root: Path, source: str = "") -> dict[str, Any]:
    spec = SPECS[package]
    recording: dict[str, Any] = {"package": package, "version": version, "how": "tests/dynamo_llm/record_api.py"}
    if source:
        recording["source"] = source
    functions = recording["functions"] = {}
    for entry in spec["functions"]:
        name, found = _method(root, entry)
        functions[name] = {"async": isinstance(found, ast.AsyncFunctionDef), "parameters": parameters(found)}
    if "keys" in spec:
        recording["keys"] = {name: _keys(found) for name, found in (_method(root, entry) for entry in spec["keys"])}
    fields = recording["fields"] = {}
    for entry in spec["fields"]:
        path, _, name = entry.partition(":")
        if "*" in path:  # a class that is put together from those of a folder
            trees = [ast.parse(file.read_text()) for file in sorted(root.glob(path))]
            fields[name] = [
                name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef) for name in _fields(node)
            ]
        else:
            fields[name] = _fields(_class(ast.parse((root / path).read_text()), name))
    attributes = recording["attributes"] = {}
    for entry in spec["attributes"]:
        path, name, wanted = entry.split(":")
        source = (root / path).read_text()
        attributes[name] = [
            attribute for attribute in wanted.split(",") if f"self.{attribute}" in source or f".{attribute} =" in source
        ]
    return recording


if __name__ == "__main__":
    print(json.dumps(record(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *sys.argv[4:]), indent=1))
