"""The text of a DOCX's elements, as the document stands with all tracked changes accepted.

python-docx's own texts leave out what lies in a content control or a tracked insertion, and give a
merged cell once for each column that it spans.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
PARAGRAPH, TABLE = f"{_W}p", f"{_W}tbl"
_ROW, _CELL, _TEXT, _BOX = f"{_W}tr", f"{_W}tc", f"{_W}t", f"{_W}txbxContent"
#: Elements that stand for a letter.
_LETTERS = {
    f"{_W}tab": "\t",
    f"{_W}ptab": "\t",
    f"{_W}br": "\n",
    f"{_W}cr": "\n",
    f"{_W}noBreakHyphen": "-",
}
#: What was removed; properties, whose tabs are tab stops; pronunciations above a text; and what older
#: programs show instead of a text box, the same text again.
_LEFT_OUT = frozenset(
    [
        *(f"{_W}{n}" for n in ("del", "moveFrom", "rt", "sectPr", "tblGrid", "tblPrEx")),
        *(f"{_W}{n}Pr" for n in ("p", "r", "tbl", "tr", "tc", "sdt")),
        "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback",
    ]
)


def inside(parent: Any, *tags: str) -> Iterator[Any]:
    """The elements of these tags in an element or in what only wraps them, in order."""
    for child in parent:
        if child.tag in tags:
            yield child
        elif child.tag not in _LEFT_OUT:
            yield from inside(child, *tags)


def text_of(block: Any) -> str:
    """The text of a paragraph; of a table, a line a row, tabs between cells."""
    if block.tag == TABLE:
        return "\n".join(
            "\t".join(_blocks(cell) for cell in inside(row, _CELL)) for row in inside(block, _ROW)
        )
    return "".join(_pieces(block))


def _blocks(parent: Any) -> str:
    return "\n".join(text_of(block) for block in inside(parent, PARAGRAPH, TABLE))


def _pieces(parent: Any) -> Iterator[str]:
    for child in parent:
        tag = child.tag
        if tag == _TEXT:
            yield child.text or ""
        elif tag in _LETTERS:
            yield _LETTERS[tag]
        elif tag == _BOX:  # lies beside the paragraph that holds it
            yield f"\n{_blocks(child)}\n"
        elif tag not in _LEFT_OUT:
            yield from _pieces(child)
