"""Writes the contract reference from the protos' own comments: `make docs` -> build/docs/contract.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from forebay.constraints import options_of
from forebay.methods import methods, service_descriptors
from forebay_gateway.contract import bindings, comments

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "build" / "docs" / "contract.md"


def main() -> None:
    """Write the page."""
    words, places = comments(), {b.method.path: b for b in bindings()}
    lines = ["# The contract", ""]
    seen: dict[str, Any] = {}
    for service in sorted(service_descriptors(), key=lambda s: s.full_name):
        lines += [f"## {service.full_name}", "", words.get(service.full_name, ""), ""]
        for descriptor in service.methods:
            path = f"/{service.full_name}/{descriptor.name}"
            method = methods()[path]
            lines += [f"### {descriptor.name}", "", words.get(descriptor.full_name, ""), ""]
            facts = [method.kind.replace("_", " "), f"scope `{method.scope}`"]
            if path in places:
                facts.append(f"`{places[path].verb} {places[path].path}`")
            lines += [
                f"{', '.join(facts)}; `{descriptor.input_type.name}` to `{descriptor.output_type.name}`.",
                "",
            ]
            for message in (descriptor.input_type, descriptor.output_type):
                _collect(message, seen)
    lines += ["## Messages", ""]
    for name in sorted(seen):
        lines += [
            f"### {name}",
            "",
            words.get(name, ""),
            "",
            "| field | type | meaning | constraints |",
            "|---|---|---|---|",
        ]
        lines += [_row(f, words) for f in seen[name].fields] + [""]
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text("\n".join(lines))
    print(TARGET)


def _collect(message: Any, seen: dict[str, Any]) -> None:
    if message.full_name in seen or message.full_name.startswith("google."):
        return
    if message.GetOptions().map_entry:
        return
    seen[message.full_name] = message
    for field in message.fields:
        if field.message_type is not None:
            _collect(field.message_type, seen)


def _row(field: Any, words: Any) -> str:
    names = {
        v: k.removeprefix("TYPE_").lower()
        for k, v in vars(cast(Any, type(field))).items()
        if k.startswith("TYPE_")
    }
    kind = field.message_type or field.enum_type
    text = kind.name if kind is not None else names.get(field.type, "")
    rule = options_of(field)
    bounds = " ".join(str(rule).split()) if rule is not None else ""
    repeated = "repeated " if field.is_repeated else ""
    return f"| `{field.name}` | {repeated}{text} | {words.get(field.full_name, '')} | {bounds} |"


if __name__ == "__main__":
    main()
