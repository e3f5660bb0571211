"""Chat templates, against transformers' own rendering."""

import json
from typing import Any

import pytest
import transformers
from scripted_worker import FILES, MODEL_FOLDER

from router.chat_template import ChatTemplate
from router.errors import InvalidRequest

TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": 'a < b & c\'s "é"', "parameters": {"z": 1, "a": [1.5, None, True]}},
    }
]
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": 'Be <brief> & "kind".'}, {"role": "user", "content": "é€😀\n  two lines  "}],
    [
        {"role": "user", "content": "2+3?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"b": 3, "a": 2}}}],
        },
        {"role": "tool", "content": "5"},
    ],
]
TEMPLATES = {
    "demo": FILES["chat_template.jinja"].decode(),
    "whitespace": """
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- bos_token }}
    {%- endif %}
    {% if message.role == 'tool' %}{% continue %}{% endif %}
    <{{ message.role }}>
    {{ (message.content or '') | trim }}
    {% generation %}x{% endgeneration %}
{% endfor %}
{{- tools | tojson(indent=2) if tools else '' }}
{{- eos_token if not add_generation_prompt }}
""",
}


@pytest.fixture(scope="module")
def reference() -> Any:
    return transformers.AutoTokenizer.from_pretrained(MODEL_FOLDER)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompted", [True, False])
def test_same_as_transformers(reference: Any, template: str, chat: Any, tools: Any, prompted: bool) -> None:
    """The prompt is byte for byte what transformers makes of the same template."""
    ours = ChatTemplate.from_files({**FILES, "chat_template.jinja": TEMPLATES[template].encode()})
    theirs = reference.apply_chat_template(
        chat, tools=tools, chat_template=TEMPLATES[template], add_generation_prompt=prompted, tokenize=False
    )
    assert ours.render(chat, tools, add_generation_prompt=prompted) == theirs


def test_template_of_tokenizer_config() -> None:
    """Without a file of its own the template of tokenizer_config.json is used, one for tools where there are two."""
    config = {
        "bos_token": {"content": "<s>"},
        "chat_template": [
            {"name": "default", "template": "{{ bos_token }}plain"},
            {"name": "tool_use", "template": "tools"},
        ],
    }
    template = ChatTemplate.from_files({"tokenizer_config.json": json.dumps(config).encode()})
    assert template.render(CHATS[0]) == "<s>plain"
    assert template.render(CHATS[0], TOOLS) == "tools"


def test_options_are_variables_but_replace_nothing() -> None:
    """`chat_template_kwargs` reach the template, and cannot stand in for the messages."""
    template = ChatTemplate("{{ thinking }} {{ messages | length }} {{ bos_token }}", {"bos_token": "B"})
    assert template.render(CHATS[0], options={"thinking": "on", "messages": [], "bos_token": "X"}) == "on 1 B"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no system role here') }}", "no system role here"),
        ("{{ messages[0].content.missing.deeper }}", "refuses these messages"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses these messages"),
        ("{% for i in range(10**9) %}{% endfor %}", "refuses these messages"),
        ("{{ messages.append(1) }}", "refuses these messages"),
    ],
)
def test_a_template_that_fails_is_the_clients_error(source: str, message: str) -> None:
    """Whatever a template raises is one line for the client; the sandbox lets nothing out and changes nothing."""
    with pytest.raises(InvalidRequest, match=message) as caught:
        ChatTemplate(source, {}).render([{"role": "user", "content": "hi"}])
    assert caught.value.param == "messages"


def test_no_template() -> None:
    """A model without a template says so when somebody chats with it."""
    with pytest.raises(InvalidRequest, match="no chat template"):
        ChatTemplate.from_files({"tokenizer_config.json": b"{}"}).render(CHATS[0])


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.jinja": b"{% if %}"},
        {"tokenizer_config.json": b"[]"},
        {"tokenizer_config.json": b'{"chat_template": [{"template": "x"}]}'},
        {"tokenizer_config.json": b'{"chat_template": [null]}'},
        {"tokenizer_config.json": b'{"chat_template": [{"name": "default", "template": 1}]}'},
        {"tokenizer_config.json": b'{"chat_template": 1}'},
    ],
)
def test_unreadable_files(files: dict[str, bytes]) -> None:
    """Broken files are refused when they are read."""
    with pytest.raises(ValueError, match=r"template|tokenizer_config"):
        ChatTemplate.from_files(files)


def test_strftime_now() -> None:
    """Templates may ask for the date."""
    assert ChatTemplate("{{ strftime_now('%Y') }}", {}).render(CHATS[0]).isdigit()
