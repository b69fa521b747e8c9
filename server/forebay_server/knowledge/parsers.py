"""From a file's bytes to its text, by format. Runs in the worker process alone: see parsing.py."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from forebay_server.knowledge.docx_text import PARAGRAPH, TABLE, inside, text_of

#: Characters of one document's text.
MAX_CHARACTERS = 50_000_000
#: Bytes that a DOCX may unpack to.
MAX_UNPACKED = 256 << 20
#: `code` of lxml's syntax error that is none: memory was at its end.
XML_NO_MEMORY = 2


class ParseError(Exception):
    """A document that cannot be read. `reason` is one of those in the contract's Document."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(slots=True)
class Parsed:
    """A document's text.

    Attributes:
        pages: where each page begins in `text`, in characters; one entry for unpaged formats.
        headings: (where it begins, level from 1, title), in order.
        paged: whether the format has pages.
    """

    media_type: str
    text: str
    pages: list[int] = field(default_factory=lambda: [0])
    headings: list[tuple[int, int, str]] = field(default_factory=list)
    paged: bool = False


def parse(name: str, data: bytes, password: str = "") -> Parsed:
    """The text of a file. The content decides its format; the name only where it says nothing.

    Raises:
        ParseError: with the reason that the caller sees.
    """
    if not data.strip():
        raise ParseError("EMPTY", "the file is empty")
    parsed = _format(name, data)(data, password)
    # Half of a surrogate pair, which JSON and PDF can hold, cannot be stored or sent.
    parsed.text = _whole(parsed.text)
    if len(parsed.text) > MAX_CHARACTERS:
        raise ParseError(
            "TOO_LARGE", f"it has {len(parsed.text)} characters; the limit is {MAX_CHARACTERS}"
        )
    if not any(c.isalnum() for c in parsed.text):
        why = "its pages hold images only, or nothing" if parsed.paged else "it holds no words"
        raise ParseError("NO_TEXT", f"no text was found: {why}")
    return parsed


Parser = Callable[[bytes, str], Parsed]


def _format(name: str, data: bytes) -> Parser:
    ending = name.lower().rpartition(".")[2]
    if data[:1024].lstrip().startswith(b"%PDF-") or (ending == "pdf" and b"\0" not in data[:4]):
        return _pdf
    if data.startswith(b"PK\x03\x04"):
        return _docx
    if data.startswith(b"\xd0\xcf\x11\xe0"):
        raise ParseError(
            "UNSUPPORTED", "it is an old Office file, or an encrypted one; save as DOCX"
        )
    head = data[:4096]
    if b"\0" in head and not head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ParseError("UNSUPPORTED", "it is a binary file of a format that is not read")
    by_name: dict[str, Parser] = {
        "html": _html, "htm": _html, "xhtml": _html, "md": _markdown, "markdown": _markdown,
        "csv": _csv, "tsv": _csv, "json": _json, "jsonl": _json, "ndjson": _json,
    }  # fmt: skip
    if ending in by_name:
        return by_name[ending]
    if re.match(rb"\s*(<!doctype html|<html)", head, re.I):
        return _html
    return _plain


def decode(data: bytes, declared: str = "") -> str:
    """Text of bytes: by its byte-order mark, else UTF-8, else as declared, else Windows-1252."""
    for mark, encoding in ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):  # fmt: skip
        if data.startswith(mark):
            return data.decode(encoding, "replace")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        pass
    try:
        encoding = codecs.lookup(declared or "cp1252").name
        # Browsers read both as Windows-1252, and so pages are written.
        return data.decode("cp1252" if encoding in ("iso8859-1", "ascii") else encoding, "replace")
    except (LookupError, UnicodeError):  # no encoding of texts
        return data.decode("cp1252", "replace")


def _clean(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")


def _whole(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _plain(data: bytes, _: str) -> Parsed:
    return Parsed("text/plain", _clean(decode(data)))


_HEADING = re.compile(r"^(#{1,6})[ \t]+(.+?)[ \t#]*$", re.M)
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.M | re.S)


def _markdown(data: bytes, _: str) -> Parsed:
    text = _clean(decode(data))
    fences = [m.span() for m in _FENCE.finditer(text)]
    headings = [
        (m.start(), len(m[1]), m[2].strip())
        for m in _HEADING.finditer(text)
        if not any(a <= m.start() < b for a, b in fences)
    ]
    return Parsed("text/markdown", text, headings=headings)


_BLOCKS = frozenset(
    [
        "address",
        "article",
        "aside",
        "blockquote",
        "br",
        "dd",
        "div",
        "dl",
        "dt",
        "fieldset",
        "figcaption",
        "figure",
        "footer",
        "form",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "header",
        "hr",
        "li",
        "main",
        "nav",
        "ol",
        "p",
        "pre",
        "section",
        "table",
        "tr",
        "ul",
    ]
)


_CHARSET = re.compile(
    rb"""<(?:meta|\?xml)[^>]*(?:charset|encoding)\s*=\s*["']?\s*([a-z0-9_.:-]+)""", re.I
)


def _block_of(node: Any) -> int:
    """The block that a node of text stands in."""
    while node.parent is not None:
        node = node.parent
        if node.tag in _BLOCKS:
            break
    return node.mem_id


def _html(data: bytes, _: str) -> Parsed:
    from selectolax.lexbor import LexborHTMLParser

    declared = _CHARSET.search(data, 0, 1024)
    tree = LexborHTMLParser(decode(data, declared[1].decode("ascii") if declared else ""))
    for tag in ("script", "style", "noscript", "template", "svg"):
        for node in tree.css(tag):
            node.decompose()
    body = tree.body
    if body is None:
        return Parsed("text/html", "")
    pieces: list[str] = []
    headings: list[tuple[int, int, str]] = []
    length = 0
    block = None
    # traverse() walks in the document's order and does not recurse: deep nesting is harmless.
    for node in body.traverse(include_text=True):
        if node.tag == "-text":
            piece = re.sub(r"\s+", " ", node.text_content or "")
            if piece == " " and (not pieces or pieces[-1].endswith(("\n", " "))):
                continue
            if piece != " ":  # a block that has ended ends a line, as one that begins does
                before, block = block, _block_of(node)
                if block != before and pieces and not pieces[-1].endswith(("\n", "\t")):
                    pieces.append("\n")
                    length += 1
        elif node.tag in _BLOCKS:
            if pieces and not pieces[-1].endswith("\n"):
                pieces.append("\n")
                length += 1
            if re.fullmatch("h[1-6]", node.tag):
                title = re.sub(r"\s+", " ", node.text()).strip()
                headings.append((length, int(node.tag[1]), title))
            continue
        elif node.tag in ("td", "th"):
            piece = "\t"
        else:
            continue
        pieces.append(piece)
        length += len(piece)
    return Parsed("text/html", "".join(pieces), headings=headings)


_LIGATURES = {"\ufb00": "ff", "\ufb01": "fi", "\ufb02": "fl", "\ufb03": "ffi", "\ufb04": "ffl"}
#: Letters of scripts that are written from right to left.
_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")
#: Control characters that PDFs leave in texts; U+FFFE is PDFium's mark of a hyphen at a line's end.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_BROKEN_WORD = re.compile("\ufffe\n?")


def _pdf(data: bytes, password: str) -> Parsed:
    """PDFium, which knows the encodings of all scripts; but it gives right-to-left text in the
    order of the page's glyphs, so such pages are read by pypdf."""
    import pypdfium2
    from pypdfium2 import raw

    try:
        document = pypdfium2.PdfDocument(data, password=password or None)
    except pypdfium2.PdfiumError as e:
        if getattr(e, "err_code", None) == raw.FPDF_ERR_PASSWORD:
            if password:
                raise ParseError("WRONG_PASSWORD", "the password does not open it") from None
            raise ParseError("ENCRYPTED", "it is encrypted; give its password") from None
        raise ParseError("BROKEN", f"it is no readable PDF: {_brief(e)}") from None
    pieces: list[str] = []
    pages: list[int] = []
    length = broken = 0
    for number in range(len(document)):
        pages.append(length)
        try:
            text = document[number].get_textpage().get_text_bounded()
        except pypdfium2.PdfiumError:
            broken += 1
            text = ""
        if _RIGHT_TO_LEFT.search(text):
            text = _by_pypdf(data, password, number) or text
        pieces.append(_page_text(text))
        length += len(pieces[-1])
        if length > MAX_CHARACTERS:
            break
    if not pages:
        raise ParseError("BROKEN", "it has no pages")
    if broken == len(pages):
        raise ParseError("BROKEN", "none of its pages can be read")
    return Parsed("application/pdf", "".join(pieces), pages, paged=True)


def _page_text(text: str) -> str:
    text = _BROKEN_WORD.sub("", _clean(text))
    text = _CONTROL.sub(" ", text)
    for ligature, letters in _LIGATURES.items():
        text = text.replace(ligature, letters)
    return text.strip("\n") + "\n\n"


def _by_pypdf(data: bytes, password: str, number: int) -> str:
    """A page's text in reading order; empty where pypdf cannot."""
    import pypdf

    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted:
            reader.decrypt(password)
        return reader.pages[number].extract_text()
    except Exception:  # broken files make pypdf raise almost anything
        return ""


def _docx(data: bytes, _: str) -> Parsed:
    import docx
    from docx.text.paragraph import Paragraph

    media = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            if "word/document.xml" not in names:
                raise ParseError("UNSUPPORTED", "it is a zip archive, but no DOCX")
            if sum(i.file_size for i in archive.infolist()) > MAX_UNPACKED:
                raise ParseError("TOO_LARGE", f"it unpacks to more than {MAX_UNPACKED} bytes")
        document = docx.Document(io.BytesIO(data))
        pieces: list[str] = []
        headings: list[tuple[int, int, str]] = []
        length = 0
        for block in inside(document.element.body, PARAGRAPH, TABLE):
            text = text_of(block)
            if block.tag == PARAGRAPH:
                named = Paragraph(block, document).style
                style = (named.name if named is not None else "") or ""
                level = re.fullmatch(r"Heading (\d)", style)
                if text.strip() and (level or style == "Title"):
                    headings.append((length, int(level[1]) if level else 1, text.strip()))
            pieces.append(_clean(text) + "\n")
            length += len(pieces[-1])
    except (ParseError, MemoryError):  # what is too large to read is not broken
        raise
    except Exception as e:
        if getattr(e, "code", None) == XML_NO_MEMORY:
            raise MemoryError from None
        raise ParseError("BROKEN", f"it is no readable DOCX: {_brief(e)}") from None
    return Parsed(media, "".join(pieces), headings=headings)


def _csv(data: bytes, _: str) -> Parsed:
    """One line a row, `column: value` pairs: a row that is found says what its numbers are."""
    text = _clean(decode(data))
    csv.field_size_limit(1 << 20)
    try:
        # Of the guess the delimiter alone: where the beginning has no doubled quotes, it would have
        # those further down be something else, and takes apostrophes for quotes.
        delimiter = csv.Sniffer().sniff(text[:16384], delimiters=",;\t|").delimiter
    except csv.Error:
        delimiter = ","
    lines: list[str] = []
    try:
        rows = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
        header = next(rows, [])
        for row in rows:
            pairs = [
                f"{header[i] if i < len(header) else i + 1}: {value}"
                for i, value in enumerate(row)
                if value.strip()
            ]
            lines.append("; ".join(pairs))
    except csv.Error as e:
        raise ParseError("BROKEN", f"it is no readable CSV: {_brief(e)}") from None
    return Parsed("text/csv", "\n".join(lines) if lines else text)


def _json(data: bytes, _: str) -> Parsed:
    """One line a value, `path: value`."""
    text = decode(data)
    lines: list[str] = []
    try:
        try:
            _flatten(json.loads(text, parse_int=str), "", lines)
        except json.JSONDecodeError:
            # Not splitlines: strings may hold what else ends a line, U+2028 among them.
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    _flatten(json.loads(line, parse_int=str), f"{number}", lines)
    except (json.JSONDecodeError, RecursionError) as e:
        raise ParseError("BROKEN", f"it is no readable JSON: {_brief(e)}") from None
    return Parsed("application/json", _clean("\n".join(lines)))


def _flatten(value: Any, path: str, lines: list[str]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _flatten(inner, f"{path}.{key}" if path else str(key), lines)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _flatten(inner, f"{path}[{i}]", lines)
    elif value is not None and value != "":
        lines.append(f"{path}: {value}" if path else str(value))


def _brief(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
