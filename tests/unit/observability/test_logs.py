"""Logs: one JSON object a line, no secrets, and no call that waits for a slow reader."""

from __future__ import annotations

import io
import json
import logging
import os
import queue
import subprocess
import sys
from typing import Any

import pytest
from forebay_server.observability.logs import (
    AccessLines,
    ConsoleFormatter,
    JsonFormatter,
    LogWriter,
    _BoundedHandler,
    mask,
)

SECRET = "fbk_0123456789abcdef_Ab-c_dEfghijklmnopqrstuvwxyz012345678901234"


def record(message: str = "text", fields: dict[str, Any] | None = None) -> logging.LogRecord:
    made = logging.LogRecord("forebay.x", logging.INFO, "", 0, message, None, None)
    made.created = 1_800_000_000.25
    if fields is not None:
        made.access = [AccessLines(fields, [(1.5, "id", "unix:")])]
    return made


def test_a_line_is_one_json_object() -> None:
    line = JsonFormatter().format(record("two\nlines"))
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "2027-01-15T08:00:00.250Z",
        "level": "info",
        "logger": "forebay.x",
        "message": "two\nlines",
    }


def test_fields_are_the_lines_own() -> None:
    fields = {"method": "/forebay.v1.EmbeddingService/Embed", "queue_ms": 1.5, "tokens": 7}
    line = json.loads(JsonFormatter().format(record("", fields)))
    assert line.items() >= fields.items()
    assert "message" not in line
    assert "tokens=7" in ConsoleFormatter().format(record("", fields))


def test_calls_that_ended_together_are_lines_of_one_record() -> None:
    made = record("")
    each = [(1.5, "a", 'unix:"'), (2.0, "b", "unix:")]
    made.access = [AccessLines({"code": "OK"}, each), AccessLines({"code": "NOT_FOUND"}, each[:1])]
    lines = [json.loads(t) for t in JsonFormatter().format(made).split("\n")]
    assert [line["code"] for line in lines] == ["OK", "OK", "NOT_FOUND"]
    assert [line["ms"] for line in lines] == [1.5, 2.0, 1.5]
    assert (lines[0]["request_id"], lines[0]["peer"]) == ("a", 'unix:"')
    assert len(ConsoleFormatter().format(made).splitlines()) == 3


def test_lines_that_the_transport_has_begun_are_as_others() -> None:
    each = [(0.031, "a", "unix:"), (2.0, "b", "ipv4:127.0.0.1:1"), (1e-3, "c", "unix:")]
    ends = "\n".join(f'"ms":{ms},"request_id":"{i}","peer":"{peer}"}}' for ms, i, peer in each)
    whole, begun = record(""), record("")
    whole.access = [AccessLines({"code": "OK"}, each)]
    begun.access = [AccessLines({"code": "OK"}, ends)]
    assert begun.access[0].count == whole.access[0].count == 3
    for formatter in (JsonFormatter(), ConsoleFormatter()):
        assert formatter.format(begun) == formatter.format(whole)


@pytest.mark.parametrize("value", ["\ud800", 2**70, object(), {1: 2}])
def test_odd_values_lose_no_line(value: object) -> None:
    assert "odd" in json.loads(JsonFormatter().format(record("", {"odd": value})))


@pytest.mark.parametrize("formatter", [JsonFormatter(), ConsoleFormatter()])
def test_keys_are_masked_everywhere(formatter: logging.Formatter) -> None:
    try:
        raise ValueError(f"authorization: Bearer {SECRET}")
    except ValueError:
        failed = record(f"key {SECRET}.")
        failed.exc_info = sys.exc_info()
    for line in (formatter.format(failed), formatter.format(record("", {"error": SECRET}))):
        assert "fbk_0123456789abcdef_***" in line
        assert "Ab-c_dE" not in line
    assert mask("no key") == "no key"


def test_lines_that_do_not_fit_are_dropped_and_counted() -> None:
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    handler = _BoundedHandler(lines, most=3)
    for i in range(8):
        handler.handle(record(str(i)))
    assert [lines.get().getMessage() for _ in range(3)] == ["0", "1", "2"]
    handler.handle(record("later"))
    said = [lines.get().getMessage() for _ in range(2)]
    assert said[0] == "later"
    assert said[1].startswith("5 log lines were dropped")
    assert handler.dropped == 0


def test_what_waits_is_written_in_order_before_the_writer_stops() -> None:
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    out = io.StringIO()
    writer = LogWriter(records, out, JsonFormatter())
    for i in range(1000):
        records.put(record(str(i)))
    writer.stop()
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line["message"] for line in lines] == [str(i) for i in range(1000)]


def test_a_line_that_cannot_be_formatted_loses_no_other() -> None:
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    out = io.StringIO()
    writer = LogWriter(records, out, JsonFormatter())
    records.put(logging.LogRecord("forebay.x", logging.INFO, "", 0, "%d of it", ("two",), None))
    records.put(record("next"))
    writer.stop()
    first, second = (json.loads(line)["message"] for line in out.getvalue().splitlines())
    assert "could not be formatted: '%d of it'" in first
    assert second == "next"


def test_a_log_that_was_closed_ends_nothing() -> None:
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    out = io.StringIO()
    writer = LogWriter(records, out, JsonFormatter())
    out.close()
    records.put(record("lost"))
    writer.stop()
    assert records.empty()


def test_a_reader_that_stands_still_holds_nobody_up() -> None:
    """More than a pipe holds is logged while nobody reads; then all of it is there, in order."""
    code = (
        "import logging, sys\n"
        "from forebay_server.observability.logs import configure\n"
        "writer = configure('json', 'INFO', True)\n"
        "for i in range(2000): logging.getLogger('forebay.x').info('%d %s', i, 'x' * 200)\n"
        "print('logged', flush=True)\n"
        "writer.stop()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "logged\n"
    lines = [json.loads(line) for line in process.stderr]
    assert process.wait() == 0
    assert [int(line["message"].split()[0]) for line in lines] == list(range(2000))
    process.stdout.close()
    process.stderr.close()
