"""Texts of odd files."""

from __future__ import annotations

import io

import docx
import pytest
from docx.oxml import parse_xml
from docx.oxml.ns import nsdecls
from forebay_server.knowledge.parsers import parse


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("a.json", b'{"a": "half \\ud800 pair"}', "a: half ? pair"),
        ("a.json", b'{"a": "\\ud83d\\ude00 x"}', "a: \N{GRINNING FACE} x"),
        ("a.json", b'{"a": ' + b"1" * 5000 + b"}", "a: " + "1" * 5000),
        ("a.jsonl", '{"a": "b\u2028c"}\r\n{"a": 2}\n'.encode(), "1.a: b\u2028c\n2.a: 2"),
    ],
)
def test_json_is_read_whatever_its_values(name: str, data: bytes, text: str) -> None:
    assert parse(name, data).text == text


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<div><h1>Title</h1>Text <b>goes</b> on</div>", "Title\nText goes on"),
        ("<p>One</p>two<ul><li>three</li></ul>four", "One\ntwo\nthree\nfour"),
        ("a<i>b</i>c<br>d", "abc\nd"),
        ("<table><tr><td>a</td><td>b</td></tr></table>after", "\ta\tb\nafter"),
        ("<td><p>a</p></td> <p>b</p>", "a \nb"),
    ],
)
def test_html_blocks_are_lines(html: str, text: str) -> None:
    assert parse("a.html", html.encode()).text == text


@pytest.mark.parametrize(
    ("data", "last"),
    [
        ("a,b\n" + '"x","y"\n' * 4000 + '"say ""hi"", you",2\n', 'a: say "hi", you; b: 2'),
        ("name;note\n'a';\"x; y\"\n", "name: 'a'; note: x; y"),
        ('a, b\n1, "x, y"\n', "a: 1; b: x, y"),
        ("a\tb\n1\t2\n", "a: 1; b: 2"),
    ],
)
def test_csv_quotes_are_double_and_doubled(data: str, last: str) -> None:
    assert parse("a.csv", data.encode()).text.rpartition("\n")[2] == last


@pytest.mark.parametrize(
    ("head", "encoding"),
    [
        ('<meta charset="windows-1251">', "cp1251"),
        ("<meta http-equiv=content-type content='text/html; charset=Shift_JIS'>", "cp932"),
        ("<meta charset=iso-8859-1>", "cp1252"),
        ("<meta charset=zlib>", "cp1252"),
        ("<meta charset=koi8-r>", "utf-8"),
    ],
)
def test_html_is_read_in_the_encoding_that_it_declares(head: str, encoding: str) -> None:
    word = {"cp1251": "Привет", "cp932": "日本", "cp1252": "Größe – 5 €", "utf-8": "Привет 日本"}[
        encoding
    ]
    assert parse("a.html", f"<html><head>{head}<body><p>{word}".encode(encoding)).text == word


def word(*blocks: str) -> bytes:
    """A DOCX of such elements."""
    made = docx.Document()
    body = made.element.body
    for block in blocks:
        body.insert(len(body) - 1, parse_xml(block.replace(">", f" {nsdecls('w')}>", 1)))
    out = io.BytesIO()
    made.save(out)
    return out.getvalue()


def run(text: str) -> str:
    return f'<w:r><w:t xml:space="preserve">{text}</w:t></w:r>'


@pytest.mark.parametrize(
    ("block", "text"),
    [
        (f"<w:p>{run('Pay ')}<w:ins>{run('ninety days')}</w:ins></w:p>", "Pay ninety days"),
        (
            f"<w:p>{run('in ')}<w:del><w:r><w:delText>ten</w:delText></w:r>{run('gone')}</w:del>"
            f"<w:moveFrom>{run('here')}</w:moveFrom><w:moveTo>{run('there')}</w:moveTo></w:p>",
            "in there",
        ),
        (
            "<w:sdt><w:sdtPr/><w:sdtContent>"
            f"<w:p>{run('a form ')}<w:sdt><w:sdtContent>{run('field')}</w:sdtContent></w:sdt></w:p>"
            "</w:sdtContent></w:sdt>",
            "a form field",
        ),
        (
            "<w:p><w:pPr><w:tabs><w:tab w:pos='9'/></w:tabs></w:pPr>"
            "<w:r><w:t>a</w:t><w:tab/><w:t>b</w:t><w:br/><w:t>c</w:t></w:r></w:p>",
            "a\tb\nc",
        ),
        (
            "<w:tbl><w:tr><w:tc><w:tcPr><w:gridSpan w:val='3'/></w:tcPr>"
            f"<w:p>{run('over three')}</w:p></w:tc></w:tr><w:ins><w:tr>"
            f"<w:tc><w:p>{run('one')}</w:p></w:tc><w:tc><w:p>{run('two')}</w:p><w:tbl><w:tr><w:tc>"
            f"<w:p>{run('within')}</w:p></w:tc></w:tr></w:tbl></w:tc></w:tr></w:ins></w:tbl>",
            "over three\none\ttwo\nwithin",
        ),
        (
            f"<w:p>{run('before')}<w:r><w:pict><w:txbxContent><w:p>{run('in a box')}</w:p>"
            f"</w:txbxContent></w:pict></w:r>{run('after')}</w:p>",
            "before\nin a box\nafter",
        ),
    ],
)
def test_docx_text_is_what_the_document_shows(block: str, text: str) -> None:
    assert parse("a.docx", word(block)).text.strip() == text


def test_docx_headings_in_content_controls_count() -> None:
    heading = f"<w:p><w:pPr><w:pStyle w:val='Heading1'/></w:pPr>{run('Terms')}</w:p>"
    data = word(
        f"<w:sdt><w:sdtContent>{heading}</w:sdtContent></w:sdt>", f"<w:p>{run('Pay')}</w:p>"
    )
    parsed = parse("a.docx", data)
    assert [(parsed.text[at : at + 5], level, title) for at, level, title in parsed.headings] == [
        ("Terms", 1, "Terms")
    ]
