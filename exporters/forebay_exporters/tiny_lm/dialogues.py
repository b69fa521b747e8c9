"""Templated dialogues that the tiny model learns: chat turns, JSON, tool calls, answers by copying.

Values are random words and numbers, so that the model must copy them from its context.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

Messages = list[dict[str, Any]]
Dialogue = dict[str, Any]

CITIES = [
    "Paris",
    "London",
    "Berlin",
    "Madrid",
    "Rome",
    "Vienna",
    "Oslo",
    "Lisbon",
    "Prague",
    "Dublin",
    "Athens",
    "Warsaw",
    "Cairo",
    "Tokyo",
    "Lima",
    "Boston",
    "Chicago",
    "Denver",
    "Austin",
    "Seattle",
    "Toronto",
    "Sydney",
    "Delhi",
    "Seoul",
    "Kyiv",
    "Riga",
    "Bern",
    "Nice",
]
NAMES = [
    "Anna",
    "Ben",
    "Carla",
    "David",
    "Emma",
    "Frank",
    "Greta",
    "Henry",
    "Ida",
    "Jack",
    "Kate",
    "Leo",
    "Maria",
    "Noah",
    "Olga",
    "Paul",
    "Rosa",
    "Sam",
    "Tina",
    "Victor",
    "Wendy",
    "Xenia",
    "Yusuf",
    "Zoe",
    "Alice",
    "Bob",
    "Charles",
    "Diana",
]
THINGS = [
    "apple",
    "bread",
    "candle",
    "door",
    "engine",
    "flower",
    "garden",
    "hammer",
    "island",
    "jacket",
    "kettle",
    "ladder",
    "mirror",
    "needle",
    "orange",
    "pencil",
    "quilt",
    "river",
    "shovel",
    "table",
    "umbrella",
    "violin",
    "window",
    "yarn",
    "anchor",
    "bottle",
    "copper",
    "drum",
]
SYLLABLES = [
    "ba",
    "ko",
    "ri",
    "ta",
    "ne",
    "lu",
    "mo",
    "si",
    "fe",
    "da",
    "pu",
    "ga",
    "zi",
    "ho",
    "we",
    "xi",
    "ra",
    "le",
    "no",
    "ti",
    "su",
    "va",
    "ke",
    "jo",
    "mi",
    "be",
    "do",
    "fa",
    "gu",
    "la",
]
SYSTEM = "You are a helpful assistant."

TOOLS: dict[str, dict[str, Any]] = {
    "get_weather": {"city": "string"},
    "calculate": {"expression": "string"},
    "search": {"query": "string"},
    "send_email": {"to": "string", "subject": "string"},
    "get_price": {"item": "string", "quantity": "integer"},
    "set_timer": {"minutes": "integer"},
}


def word(r: random.Random) -> str:
    """A word that the model has not seen: it can only be copied."""
    return "".join(r.choice(SYLLABLES) for _ in range(r.randint(2, 3)))


def thing(r: random.Random) -> str:
    """A known or an unknown word."""
    return r.choice((r.choice(CITIES), r.choice(NAMES), r.choice(THINGS), word(r), word(r)))


def tool(name: str) -> dict[str, Any]:
    """A tool in OpenAI's shape."""
    properties = {k: {"type": v} for k, v in TOOLS[name].items()}
    return {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": properties,
                "required": list(properties),
            },
        },
    }


def _request(name: str, r: random.Random) -> tuple[str, dict[str, Any]]:
    if name == "get_weather":
        city = r.choice((r.choice(CITIES), word(r).title()))
        return f"What is the weather in {city}?", {"city": city}
    if name == "calculate":
        expression = f"{r.randint(0, 99)} {r.choice('+-*')} {r.randint(0, 99)}"
        return f"Calculate {expression}", {"expression": expression}
    if name == "search":
        query = f"{thing(r)} {thing(r)}"
        return f"Search for {query}", {"query": query}
    if name == "send_email":
        to, subject = f"{word(r)}@{word(r)}.com", f"{thing(r)}"
        return f"Send an email to {to} about {subject}", {"to": to, "subject": subject}
    if name == "get_price":
        item, quantity = r.choice((r.choice(THINGS), word(r))), r.randint(1, 99)
        return (
            f"How much do {quantity} of {item} cost?",
            {"item": item, "quantity": quantity},
        )
    minutes = r.randint(1, 99)
    return f"Set a timer for {minutes} minutes", {"minutes": minutes}


def _call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool_call(r: random.Random) -> Dialogue:
    """One call, now and then two, and now and then what the tool said."""
    names = r.sample(sorted(TOOLS), r.randint(1, 3))
    asked = [r.choice(names)] if r.random() < 0.85 or len(names) < 2 else r.sample(names, 2)
    pairs = [_request(name, r) for name in asked]
    calls = [_call(n, a) for n, (_, a) in zip(asked, pairs, strict=True)]
    messages: Messages = [
        {"role": "user", "content": " and ".join(text for text, _ in pairs)},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    if r.random() < 0.3:
        result = thing(r) + " " + str(r.randint(0, 99))
        messages.append({"role": "tool", "content": result})
        messages.append({"role": "assistant", "content": f"The result is {result}."})
    return {"messages": messages, "tools": [tool(n) for n in names]}


def tool_not_needed(r: random.Random) -> Dialogue:
    """Tools are there, the question needs none."""
    base = r.choice((greeting, repeat))(r)
    return {**base, "tools": [tool(n) for n in r.sample(sorted(TOOLS), r.randint(1, 2))]}


def greeting(r: random.Random) -> Dialogue:
    """Small talk."""
    name = r.choice((r.choice(NAMES), word(r).title()))
    pairs = [
        ("Hello", "Hello! How can I help you?"),
        ("Hi", "Hello! How can I help you?"),
        ("How are you?", "I am fine, thank you."),
        ("Who are you?", "I am a tiny test model."),
        ("Thank you", "You are welcome."),
        ("Goodbye", "Goodbye!"),
        (f"My name is {name}.", f"Nice to meet you, {name}!"),
    ]
    user, answer = r.choice(pairs)
    messages: Messages = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": answer},
    ]
    if user.startswith("My name") and r.random() < 0.6:
        messages += [
            {"role": "user", "content": "What is my name?"},
            {"role": "assistant", "content": f"Your name is {name}."},
        ]
    return {"messages": messages}


def repeat(r: random.Random) -> Dialogue:
    """Say it again: the plainest form of copying."""
    text = " ".join(thing(r) for _ in range(r.randint(1, 6)))
    return {
        "messages": [
            {"role": "user", "content": f"Repeat: {text}"},
            {"role": "assistant", "content": text},
        ]
    }


def counting(r: random.Random) -> Dialogue:
    """Long, plain answers for tests of streaming and of limits."""
    n = r.randint(3, 30)
    return {
        "messages": [
            {"role": "user", "content": f"Count to {n}"},
            {"role": "assistant", "content": " ".join(str(i) for i in range(1, n + 1))},
        ]
    }


def json_answer(r: random.Random) -> Dialogue:
    """Facts of a sentence as JSON."""
    name, age, city = (
        r.choice((r.choice(NAMES), word(r).title())),
        r.randint(1, 99),
        r.choice(CITIES),
    )
    value = {"name": name, "age": age, "city": city}
    text = f"{name} is {age} years old and lives in {city}."
    return {
        "messages": [
            {"role": "user", "content": f"Answer in JSON: {text}"},
            {"role": "assistant", "content": json.dumps(value)},
        ]
    }


def context_answer(r: random.Random) -> Dialogue:
    """A question that one of the documents answers; the answer names it."""
    n = r.randint(1, 4)
    keys = r.sample(THINGS, n)
    values = [r.choice((word(r), r.choice(CITIES), str(r.randint(10, 999)))) for _ in keys]
    facts = [f"The code of the {k} is {v}." for k, v in zip(keys, values, strict=True)]
    at = r.randrange(n)
    question, answer = f"What is the code of the {keys[at]}?", f"{facts[at]} [{at + 1}]"
    if r.random() < 0.5:
        documents = [{"title": word(r), "text": f} for f in facts]
        return {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ],
            "documents": documents,
        }
    lines = "\n".join(f"[{i}] {f}" for i, f in enumerate(facts, 1))
    return {
        "messages": [
            {"role": "user", "content": f"Context:\n{lines}\n\nQuestion: {question}"},
            {"role": "assistant", "content": answer},
        ]
    }


KINDS: tuple[tuple[Callable[[random.Random], Dialogue], float], ...] = (
    (tool_call, 0.30),
    (tool_not_needed, 0.05),
    (greeting, 0.10),
    (repeat, 0.15),
    (counting, 0.08),
    (json_answer, 0.12),
    (context_answer, 0.20),
)


def dialogue(r: random.Random) -> Dialogue:
    """A dialogue of a random kind, with or without a system message."""
    kinds, weights = zip(*KINDS, strict=True)
    out = r.choices(kinds, weights)[0](r)
    if r.random() < 0.3:
        out["messages"] = [{"role": "system", "content": SYSTEM}, *out["messages"]]
    return out
