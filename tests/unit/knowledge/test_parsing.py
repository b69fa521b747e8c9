"""DocumentParser: many documents at once, limits, and a process that is gone."""

from __future__ import annotations

import asyncio
import io
import os
import zipfile
from pathlib import Path

import docx
import pytest
import uvloop
from forebay_server.knowledge.parsers import ParseError
from forebay_server.knowledge.parsing import DocumentParser, ParseLimits


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


async def test_each_document_gets_its_own_text(tmp_path: Path) -> None:
    parser = DocumentParser()
    paths = [put(tmp_path, f"{i}.txt", f"text {i} ".encode() * 20_000) for i in range(12)]
    found = await asyncio.gather(*(parser.parse(p, p.name) for p in paths))
    assert [f.text[:7] for f in found] == [f"text {i} "[:7] for i in range(12)]
    await parser.close()


async def test_a_process_that_is_gone_is_started_again(tmp_path: Path) -> None:
    parser = DocumentParser()
    path = put(tmp_path, "a.txt", b"some words")
    assert (await parser.parse(path, "a.txt")).text == "some words"
    assert parser._process is not None
    parser._process.kill()
    assert (await parser.parse(path, "a.txt")).text == "some words"
    await parser.close()


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (ParseLimits(wall_s=0.3, cpu_s=60), "TIMEOUT"),
        (ParseLimits(wall_s=60, cpu_s=1), "TIMEOUT"),
        (ParseLimits(memory_bytes=160 << 20), "MEMORY"),
    ],
)
async def test_limits_end_a_document_alone(
    tmp_path: Path, limits: ParseLimits, reason: str
) -> None:
    parser = DocumentParser(limits)
    deep = put(tmp_path, "large.json", b'[{"a": [' + b'{"b": 1},' * 2_000_000 + b'{"b": 1}]}]')
    with pytest.raises(ParseError) as caught:
        await parser.parse(deep, "large.json")
    assert caught.value.reason == reason
    small = put(tmp_path, "a.txt", b"some words")
    assert (await parser.parse(small, "a.txt")).text == "some words"
    await parser.close()


async def test_a_docx_that_takes_too_much_memory_is_not_broken(tmp_path: Path) -> None:
    made = io.BytesIO()
    docx.Document().save(made)
    runs = b"<w:p><w:r><w:t>some words</w:t></w:r></w:p>" * 1_000_000
    large = tmp_path / "large.docx"
    with zipfile.ZipFile(made) as old, zipfile.ZipFile(large, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "word/document.xml":
                data = data.replace(b"<w:body>", b"<w:body>" + runs)
            new.writestr(name, data)
    parser = DocumentParser(ParseLimits(memory_bytes=300 << 20))
    with pytest.raises(ParseError) as caught:
        await parser.parse(large, "large.docx")
    assert caught.value.reason == "MEMORY"
    await parser.close()


def test_no_descriptor_is_closed_twice_or_left(tmp_path: Path) -> None:
    """Under uvloop, as the server runs, with threads that open files all the while."""

    async def work() -> None:
        parser = DocumentParser()
        path = put(tmp_path, "a.txt", b"some words")
        await parser.parse(path, "a.txt")
        before = len(os.listdir("/proc/self/fd"))
        stop = False

        def churn() -> int:
            count = 0
            while not stop:
                with path.open("rb") as file:  # raises when somebody else closed its descriptor
                    file.read()
                count += 1
            return count

        threads = [asyncio.create_task(asyncio.to_thread(churn)) for _ in range(2)]
        try:
            for _ in range(60):
                await parser.parse(path, "a.txt")
        finally:
            stop = True
        await asyncio.gather(*threads)
        assert len(os.listdir("/proc/self/fd")) <= before + 1
        await parser.close()

    uvloop.run(work())
