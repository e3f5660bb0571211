"""Synthetic chat corpus for the demo model.

Every conversation is generated from the grammar below, so the corpus has no
outside licence and every answer can be checked by a test.  `sample(rng)`
returns one conversation as a list of ``{"role", "content"}`` messages;
`render(messages)` turns it into the text that the chat template produces.
"""

from __future__ import annotations

import json
import random

CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "Greece": "Athens",
    "Austria": "Vienna",
    "Belgium": "Brussels",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Poland": "Warsaw",
    "Hungary": "Budapest",
    "Ireland": "Dublin",
    "Japan": "Tokyo",
    "China": "Beijing",
    "India": "New Delhi",
    "Thailand": "Bangkok",
    "Vietnam": "Hanoi",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Ghana": "Accra",
    "Morocco": "Rabat",
    "Senegal": "Dakar",
    "Canada": "Ottawa",
    "Mexico": "Mexico City",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Chile": "Santiago",
    "Brazil": "Brasilia",
    "Argentina": "Buenos Aires",
    "Colombia": "Bogota",
    "Ecuador": "Quito",
    "Uruguay": "Montevideo",
    "Australia": "Canberra",
    "Turkey": "Ankara",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "Nepal": "Kathmandu",
}
ANIMALS = ["fox", "owl", "bear", "rabbit", "turtle", "crow", "otter", "goat", "mouse", "heron"]
PLACES = ["forest", "river", "mountain", "village", "desert", "island", "valley", "harbor", "garden", "cave"]
THINGS = ["lantern", "map", "key", "stone", "bell", "seed", "rope", "mirror", "drum", "book"]
TRAITS = ["brave", "quiet", "clever", "gentle", "stubborn", "curious", "patient", "cheerful"]
WEATHER = ["sunny", "rainy", "windy", "cloudy", "snowy", "foggy"]
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
WORDS = (
    ANIMALS
    + PLACES
    + THINGS
    + [
        "apple",
        "silver",
        "orange",
        "winter",
        "music",
        "paper",
        "window",
        "yellow",
        "number",
        "summer",
        "coffee",
        "table",
        "green",
        "cloud",
        "bread",
        "horse",
    ]
)
NAMES = ["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gia", "Hugo", "Iris", "Jon", "Kim", "Leo", "Mia", "Noa"]
SYSTEMS = [
    "You are a helpful assistant.",
    "You are a concise assistant.",
    "Answer clearly and briefly.",
    "You are the demo model of an inference server.",
]
TOOLS = {
    "get_weather": ("city", sorted(CAPITALS.values())),
    "get_capital": ("country", sorted(CAPITALS)),
    "add": (("a", "b"), None),
    "find_item": ("item", THINGS),
}


def _story(rng: random.Random) -> tuple[str, str]:
    animal, place, thing, trait = (rng.choice(x) for x in (ANIMALS, PLACES, THINGS, TRAITS))
    friend = rng.choice([a for a in ANIMALS if a != animal])
    weather = rng.choice(WEATHER)
    lines = [
        f"Once there was a {trait} {animal} who lived near the {place}.",
        f"One {weather} morning the {animal} found a {thing} under a tree.",
        f"The {animal} asked every friend in the {place} who had lost the {thing}.",
        f'At last a {friend} said, "That {thing} is mine, and I looked for it all night."',
        f"The {animal} gave the {thing} back, and the {friend} was glad.",
        f"From that day on the {animal} and the {friend} walked through the {place} together.",
    ]
    if rng.random() < 0.5:
        lines.insert(5, f'"You are a {trait} friend," said the {friend}, and the two shared some bread.')
    ask = rng.choice(
        [
            f"Tell me a story about a {animal}.",
            f"Tell me a story about a {trait} {animal} and a {thing}.",
            f"Write a short story about a {animal} in the {place}.",
            f"Story: {animal}, {place}, {thing}.",
        ]
    )
    return ask, " ".join(lines)


def _capital(rng):
    country, capital = rng.choice(list(CAPITALS.items()))
    kind = rng.random()
    if kind < 0.6:
        return rng.choice(
            [
                f"What is the capital of {country}?",
                f"Name the capital of {country}.",
                f"Which city is the capital of {country}?",
            ]
        ), f"The capital of {country} is {capital}."
    return rng.choice(
        [f"Which country has the capital {capital}?", f"{capital} is the capital of which country?"]
    ), f"{capital} is the capital of {country}."


def _sum(rng):
    a, b = rng.randrange(0, 50), rng.randrange(0, 50)
    return rng.choice([f"What is {a} + {b}?", f"Add {a} and {b}.", f"{a} + {b} ="]), f"{a} + {b} = {a + b}."


def _count(rng):
    a = rng.randrange(0, 60)
    b = a + rng.randrange(2, 30)
    return rng.choice([f"Count from {a} to {b}.", f"Please count from {a} up to {b}."]), ", ".join(
        map(str, range(a, b + 1))
    ) + "."


def _copy(rng):
    words = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 9)))
    return rng.choice([f"Repeat after me: {words}", f"Say exactly: {words}"]), words


def _spell(rng):
    word = rng.choice(WORDS)
    return f"Spell the word {word}.", "-".join(word) + "."


def _needle(rng):
    people = rng.sample(NAMES, rng.randrange(3, 12))
    facts = {p: (rng.choice(THINGS), rng.randrange(100, 1000)) for p in people}
    text = " ".join(f"{p} keeps the {t} in box {n}." for p, (t, n) in facts.items())
    who = rng.choice(people)
    thing, number = facts[who]
    if rng.random() < 0.5:
        return f"{text} In which box does {who} keep the {thing}?", f"{who} keeps the {thing} in box {number}."
    return f"{text} What does {who} keep?", f"{who} keeps the {thing}."


def _identity(rng):
    return rng.choice(
        [
            ("Who are you?", "I am a small demo model. I know capitals, sums, counting, spelling and short stories."),
            ("Hello!", "Hello! How can I help you?"),
            ("Hi", "Hello! How can I help you?"),
            ("Thank you.", "You are welcome."),
            (
                "What can you do?",
                "I can name capitals, add numbers, count, spell words, recall facts and tell short stories.",
            ),
        ]
    )


def _think(rng):
    a, b, c = (rng.randrange(0, 30) for _ in range(3))
    thought = f"{a} + {b} = {a + b}. {a + b} + {c} = {a + b + c}."
    return f"Think step by step: what is {a} + {b} + {c}?", f"<think>{thought}</think>The answer is {a + b + c}."


def tool_schema(name: str) -> dict:
    """OpenAI function schema of one demo tool."""
    arg = TOOLS[name][0]
    props = {a: {"type": "integer"} for a in arg} if isinstance(arg, tuple) else {arg: {"type": "string"}}
    return {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": props, "required": list(props)}},
    }


def _tool(rng) -> list[dict]:
    names = rng.sample(list(TOOLS), rng.randrange(1, len(TOOLS) + 1))
    name = rng.choice(names)
    arg, values = TOOLS[name]
    if name == "add":
        args = {"a": rng.randrange(0, 500), "b": rng.randrange(0, 500)}
        ask = f"Use a tool to add {args['a']} and {args['b']}."
        result, final = str(args["a"] + args["b"]), f"The sum is {args['a'] + args['b']}."
    else:
        value = rng.choice(values)
        args = {arg: value}
        ask = {
            "get_weather": f"What is the weather in {value}?",
            "get_capital": f"Look up the capital of {value}.",
            "find_item": f"Where is the {value}?",
        }[name]
        answer = {
            "get_weather": rng.choice(WEATHER),
            "get_capital": CAPITALS.get(value, ""),
            "find_item": f"box {rng.randrange(100, 1000)}",
        }[name]
        result = answer
        final = {
            "get_weather": f"It is {answer} in {value}.",
            "get_capital": f"The capital of {value} is {answer}.",
            "find_item": f"The {value} is in {answer}.",
        }[name]
    system = "Tools: " + " ".join(json.dumps(tool_schema(n)["function"], separators=(", ", ": ")) for n in names)
    call = json.dumps({"name": name, "arguments": args}, separators=(", ", ": "))
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": ask},
        {"role": "assistant", "content": f"<tool_call>{call}</tool_call>"},
    ]
    if rng.random() < 0.6:
        messages += [{"role": "tool", "content": result}, {"role": "assistant", "content": final}]
    return messages


_SKILLS = [
    (_story, 3),
    (_capital, 4),
    (_sum, 5),
    (_count, 2),
    (_copy, 3),
    (_spell, 2),
    (_needle, 4),
    (_identity, 1),
    (_think, 2),
]


def sample(rng: random.Random) -> list[dict]:
    """One conversation: 1 to 4 turns of the skills above, or a tool call."""
    if rng.random() < 0.15:
        return _tool(rng)
    messages = [{"role": "system", "content": rng.choice(SYSTEMS)}] if rng.random() < 0.6 else []
    for _ in range(rng.choice([1, 1, 2, 3, 4])):
        skill = rng.choices([s for s, _ in _SKILLS], [w for _, w in _SKILLS])[0]
        ask, answer = skill(rng)
        messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
    return messages


def render(messages: list[dict]) -> str:
    """The text that `CHAT_TEMPLATE` makes of a whole conversation."""
    return "<|begin|>" + "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in messages)


CHAT_TEMPLATE = (
    "<|begin|>"
    "{%- if tools %}<|system|>Tools: {% for tool in tools %}{{ tool.function | tojson }}"
    "{% if not loop.last %} {% endif %}{% endfor %}<|end|>{% endif %}"
    "{%- for message in messages %}"
    "{%- if not (tools and message.role == 'system') %}<|{{ message.role }}|>"
    "{%- if message.tool_calls %}{% for call in message.tool_calls %}<tool_call>"
    '{"name": "{{ call.function.name }}", "arguments": '
    "{{ call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}}"
    "</tool_call>{% endfor %}{% else %}{{ message.content }}{% endif %}<|end|>{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = [
    "<|begin|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
]
