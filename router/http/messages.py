"""Chat messages as clients send them, made into what templates expect."""

import json
from collections.abc import Sequence
from typing import Any

from router.errors import InvalidRequest


def for_template(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Roles checked, text parts joined, arguments of tool calls as objects. Raises `InvalidRequest`."""
    return [_message(message, f"messages[{position}]") for position, message in enumerate(messages)]


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"{where}: a message needs a role", param=f"{where}.role")
    made = dict(message)
    made["role"] = "system" if role == "developer" else role  # templates know it by its older name
    calls = message.get("tool_calls")
    if calls is not None:
        made["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
    content = _text(message.get("content"), f"{where}.content")
    made["content"] = "" if content is None and not calls else content
    return made


def _text(content: Any, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{where}: expected a text or a list of parts", param=where)
    texts = []
    for position, part in enumerate(content):
        at = f"{where}[{position}]"
        if not isinstance(part, dict) or part.get("type") != "text":
            raise InvalidRequest(f"{at}: only parts of type `text` are supported", param=at)
        if not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{at}: a text part needs a `text`", param=f"{at}.text")
        texts.append(part["text"])
    return "\n".join(texts)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """OpenAI's arguments are a text of JSON; templates mostly want the object."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InvalidRequest(f"{where}: expected a list of tool calls", param=where)
    made = []
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            call = {**call, "function": {**function, "arguments": _arguments(function["arguments"])}}
        made.append(call)
    return made


def _arguments(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, dict) else text
