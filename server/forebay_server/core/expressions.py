"""Regular expressions that the grammar engine reads as they are meant; others are refused."""

from __future__ import annotations

import re
from collections.abc import Iterable
from re import _constants, _parser  # pyright: ignore[reportAttributeAccessIssue] - private
from typing import Any

from forebay.errors import InvalidArgument

_OPCODES = frozenset(code.name for code in _constants.OPCODES)
#: Parts of regular expressions that grammars can be made of.
_REGEX = frozenset(
    {
        "ANY",
        "AT",
        "BRANCH",
        "IN",
        "LITERAL",
        "MAX_REPEAT",
        "MIN_REPEAT",
        "NOT_LITERAL",
        "SUBPATTERN",
        "RANGE",
        "NEGATE",
        "CATEGORY",
        "MAX_UNTIL",
        "MIN_UNTIL",
    }
)
_ESCAPE = r"\\x[0-9a-fA-F]{2,}|\\."
#: An expression's parts: escapes, classes, what opens a group, counts, single characters.
_PARTS = re.compile(rf"{_ESCAPE}|\[\^?(?:\\.|[^\]\\])*\]|\(\?:?|\{{\d+(?:,\d*)?\}}|.", re.DOTALL)
_ESCAPES = re.compile(_ESCAPE, re.DOTALL)
#: Those that Python reads and the grammar engine does not: word boundaries, a class that begins with
#: its own end, groups with a name or flags, a brace that begins no count.
_UNREAD = frozenset({r"\b", r"\B", "[]", "(?", "{"})
#: Escapes that the engine reads as something else: the letters A and Z, octal numbers and references,
#: and \x, to which it takes all hexadecimal digits that follow.
_MISREAD = re.compile(r"\\[AZ0-9]|\\x[0-9a-fA-F]{3,}")
#: Counts are 32 bits wide there.
MAX_COUNT = 2**31 - 1
_BEGINNING = frozenset({_constants.AT_BEGINNING, _constants.AT_BEGINNING_STRING})


def check_regex(pattern: str, path: str) -> None:
    """Raise InvalidArgument unless a grammar can enforce the expression: no look-around, no
    references back, no conditions, anchors at its ends alone."""
    try:
        parsed = _parser.parse(pattern)
        name = _unknown(parsed)
        misplaced = _misplaced(parsed, False, False)
    except (re.error, RecursionError, OverflowError) as e:
        raise InvalidArgument.at(path, f"is no regular expression: {e}") from None
    if name:
        raise _refused(path, f"has {name.lower()}, which the engine cannot enforce")
    if part := _unread(pattern):
        raise _refused(path, f"has {part!r} where the engine cannot read it")
    if misplaced:
        raise _refused(
            path,
            f"has {misplaced!r} inside, where the engine passes over it; allowed are '^' with "
            "nothing before it and '$' with nothing after it",
        )


def _refused(path: str, why: str) -> InvalidArgument:
    return InvalidArgument.at(path, why, reason="REGEX_NOT_ENFORCEABLE")


def _unread(pattern: str) -> str:
    """The first part that the grammar engine cannot read, "" when there is none. It must not get there:
    an expression that does not compile stops all answers of the model, not only its own."""
    before = "("
    for part in _PARTS.findall(pattern):
        if part in _UNREAD or (part == "|" and before in ("(", "(?:", "|")):
            return part
        for escape in _ESCAPES.findall(part):
            if _MISREAD.fullmatch(escape):
                return escape
        if part[0] == "{" and any(int(n) > MAX_COUNT for n in re.findall(r"\d+", part)):
            return part
        before = part
    return "|" if before == "|" else ""


def _unknown(node: Any) -> str:
    """Name of the first part that no grammar can be made of; "" when there is none."""
    if isinstance(node, (list, tuple, _parser.SubPattern)):
        return next((name for one in node if (name := _unknown(one))), "")
    name = getattr(node, "name", "")
    return name if name in _OPCODES and name not in _REGEX else ""


def _misplaced(pattern: Any, before: bool, after: bool) -> str:
    """The first anchor that has something on its wrong side, where the engine passes over it; "" when
    there is none. `before`, `after`: whether characters may stand on that side of the whole pattern."""
    wide = [_wide(pattern, item) for item in pattern]
    last = max((i for i, w in enumerate(wide) if w), default=-1)
    for i, (op, value) in enumerate(pattern):
        followed = after or i < last
        if op is _constants.AT:
            begins = value in _BEGINNING
            if before if begins else followed:
                return "^" if begins else "$"
        for part, repeated in _inner(op, value):
            again = repeated and wide[i]
            if found := _misplaced(part, before or again, followed or again):
                return found
        before = before or wide[i]
    return ""


def _wide(pattern: Any, item: Any) -> bool:
    """Whether a part can take characters."""
    return _parser.SubPattern(pattern.state, [item]).getwidth()[1] > 0


def _inner(op: Any, value: Any) -> Iterable[tuple[Any, bool]]:
    """Patterns within a part, and whether it repeats them."""
    if op is _constants.SUBPATTERN:
        return [(value[-1], False)]
    if op is _constants.BRANCH:
        return [(one, False) for one in value[1]]
    if op in (_constants.MAX_REPEAT, _constants.MIN_REPEAT):
        return [(value[2], value[1] > 1)]
    return []
