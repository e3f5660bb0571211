"""Chat messages to a prompt, by the model's own jinja template. `http/chat.py` calls it, and whoever else has messages.

The conventions are those of Hugging Face's `apply_chat_template`: the same globals, filters and whitespace rules. The
template comes with the model, not from the client, and runs in jinja's immutable sandbox all the same.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import msgspec
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from router.errors import InvalidRequest

_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"})


class ChatTemplate:
    """A model's chat template, compiled. Immutable."""

    def __init__(self, source: str | None, special_tokens: Mapping[str, str], tools_source: str | None = None) -> None:
        """`tools_source` is the variant for requests with tools, where the model has one. Raises ValueError."""
        self._special_tokens = dict(special_tokens)
        self._template = _compile(source)
        self._tools_template = _compile(tools_source) or self._template

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> "ChatTemplate":
        """From a model's files by name: `chat_template.jinja`, else `tokenizer_config.json`.

        A model without a template is fine until somebody chats with it. Raises ValueError for unreadable files.
        """
        config: Any = json.loads(files.get("tokenizer_config.json", b"{}"))
        if not isinstance(config, dict):
            raise ValueError("tokenizer_config.json is not a JSON object")
        named = _named_templates(config.get("chat_template"))
        if "chat_template.jinja" in files:
            named["default"] = files["chat_template.jinja"].decode()
        return cls(named.get("default"), _special_tokens(config), named.get("tool_use"))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt, special tokens included: encode it without adding any.

        `options` become variables of the template (`chat_template_kwargs`). Raises `InvalidRequest` for messages that
        the template refuses, and for a model without a template.
        """
        template = self._tools_template if tools else self._template
        if template is None:
            raise InvalidRequest("this model has no chat template: use /v1/completions", param="messages")
        variables = {key: value for key, value in (options or {}).items() if key not in _RESERVED}
        try:
            return template.render(
                {
                    **self._special_tokens,
                    **variables,
                    "messages": messages,
                    "tools": tools,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except InvalidRequest:
            raise
        except Exception as error:  # a template can raise whatever Python raises; it is the client's 400
            raise InvalidRequest(f"the chat template refuses these messages: {error}", param="messages") from error


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's tokens for training; here its body is just text."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _compile(source: str | None) -> jinja2.Template | None:
    if source is None:
        return None
    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template has an error in line {error.lineno}: {error.message}") from error


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as a model reads it: jinja's own filter escapes HTML and sorts keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise InvalidRequest(message, param="messages")


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _named_templates(entry: Any) -> dict[str, str]:
    """`chat_template` of tokenizer_config.json: one template, or a list of named ones. Raises ValueError."""
    if entry is None:
        return {}
    if isinstance(entry, str):
        return {"default": entry}
    try:
        named = msgspec.convert(entry, list[_NamedTemplate])
    except msgspec.ValidationError as error:
        raise ValueError(f"chat_template in tokenizer_config.json: {error}") from error
    return {item.name: item.template for item in named}


class _NamedTemplate(msgspec.Struct, frozen=True):
    name: str
    template: str


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """All `*_token` entries; a token is a string or an object with `content`."""
    tokens: dict[str, str] = {}
    for key, value in config.items():
        if key.endswith("_token"):
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                tokens[key] = content
    return tokens
