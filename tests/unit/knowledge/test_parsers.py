"""Texts of odd files."""

from __future__ import annotations

import pytest
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
