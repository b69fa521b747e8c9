"""Structured logs: one JSON object a line, written by a thread, so that no call waits for a pipe.

The secret part of an API key is masked wherever it turns up, tracebacks included.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import queue
import re
import sys
import threading
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TextIO

import orjson

#: Records that may wait for a slow reader of the log; beyond it lines are dropped and counted.
BACKLOG = 10_000
#: Seconds that a record waits for others at most, and so many are written together.
GATHER_S, MOST_TOGETHER = 0.02, 256
ACCESS = "forebay.access_log"
_KEY = re.compile(r"fbk_([0-9A-Za-z]+)_[\w-]+")


@dataclass(frozen=True, slots=True)
class AccessLines:
    """The access log's lines of calls that ended alike.

    Attributes:
        shared: fields that all of them say.
        each: milliseconds, request id and peer of each; or the ends of their lines in JSON, a line each,
            as the transport has written them.
    """

    shared: dict[str, object]
    each: list[tuple[float, str, str]] | str

    @property
    def count(self) -> int:
        """How many they are."""
        each = self.each
        return each.count("\n") + 1 if isinstance(each, str) else len(each)


def access_record(lines: list[AccessLines]) -> logging.LogRecord:
    """A record with these lines. A copy: a record made anew looks up threads and splits paths."""
    record = logging.LogRecord.__new__(logging.LogRecord)
    record.__dict__.update(_BLANK.__dict__, created=time.time(), access=lines)
    return record


_BLANK = logging.LogRecord(ACCESS, logging.INFO, "", 0, "", (), None)


class JsonFormatter(logging.Formatter):
    """Time, level, logger and message; or the lines of `extra={"access": [AccessLines]}`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, or several."""
        head: dict[str, Any] = {
            "time": _timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        tail: dict[str, Any] = {}
        if record.exc_info:
            tail["exception"] = self.formatException(record.exc_info)
        access: list[AccessLines] | None = getattr(record, "access", None)
        if access is None:
            return mask(_json(head | {"message": record.getMessage()} | tail))
        lines: list[str] = []
        for some in access:
            start = _json(head | some.shared | tail)[:-1]
            if isinstance(some.each, str):
                lines.append(f"{start}," + some.each.replace("\n", f"\n{start},"))
                continue
            for ms, request_id, peer in some.each:  # ids have been checked; peers are written here
                lines.append(
                    f'{start},"ms":{ms},"request_id":"{request_id}","peer":{_text(peer)}}}'
                )
        return mask("\n".join(lines))


@lru_cache(1024)
def _text(value: str) -> str:
    """A JSON string."""
    return json.dumps(value)


def _json(line: dict[str, Any]) -> str:
    try:
        return orjson.dumps(line, default=str).decode()
    except TypeError:  # lone surrogates, integers beyond 64 bits: rare, and no reason to lose it
        return json.dumps(line, default=str)


def _read(ends: str) -> list[tuple[float, str, str]]:
    found = [json.loads("{" + end) for end in ends.split("\n")]
    return [(one["ms"], one["request_id"], one["peer"]) for one in found]


class ConsoleFormatter(logging.Formatter):
    """For people: time, level, and the message or the fields of each line."""

    def format(self, record: logging.LogRecord) -> str:
        """One line or several, and the traceback where there is one."""
        access: list[AccessLines] | None = getattr(record, "access", None)
        if access is None:
            texts = [record.getMessage()]
        else:
            texts = []
            for some in access:
                end = " ".join(f"{k}={v}" for k, v in some.shared.items())
                each = _read(some.each) if isinstance(some.each, str) else some.each
                texts += [f"{end} ms={ms} request_id={i} peer={peer}" for ms, i, peer in each]
        when = time.strftime("%H:%M:%S", time.localtime(record.created))
        text = "\n".join(f"{when} {record.levelname.lower():7} {text}" for text in texts)
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        return mask(text)


class _BoundedHandler(logging.handlers.QueueHandler):
    """Drops lines rather than block; says how many at the next one that fits."""

    def __init__(self, lines: queue.SimpleQueue[logging.LogRecord], most: int = BACKLOG) -> None:
        super().__init__(lines)
        self._lines = lines
        self._most = most
        self.dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Hand the record over as it is: the thread that writes it formats it."""
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        """Never blocks."""
        if self._lines.qsize() >= self._most:
            self.dropped += sum(a.count for a in getattr(record, "access", ())) or 1
            return
        self._lines.put(record)
        if self.dropped:
            lost, self.dropped = self.dropped, 0
            self._lines.put(_lost(lost))


class LogWriter:
    """The thread that formats and writes.

    A busy server makes a record for each few calls. Woken up for each of them, this thread would take the
    interpreter from the one that serves the next: it waits a moment, and writes together what has come.
    """

    def __init__(
        self, records: queue.SimpleQueue[Any], out: TextIO, formatter: logging.Formatter
    ) -> None:
        self._records = records
        self._out = out
        self._formatter = formatter
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write what waits, and end."""
        self._records.put(None)
        self._thread.join()

    def _run(self) -> None:
        going = True
        while going:
            some = [self._records.get()]
            if self._records.empty() and some[0] is not None:
                time.sleep(GATHER_S)
            with contextlib.suppress(queue.Empty):
                while len(some) < MOST_TOGETHER:
                    some.append(self._records.get_nowait())
            going = None not in some
            text = "".join(self._text(r) + "\n" for r in some if r is not None)
            with contextlib.suppress(OSError, ValueError):  # nobody reads any more; it is closed
                self._out.write(text)
                self._out.flush()

    def _text(self, record: logging.LogRecord) -> str:
        try:
            return self._formatter.format(record)
        except Exception as e:
            said = f"a log line could not be formatted: {record.msg!r}: {e}"
            level = logging.ERROR
            return self._formatter.format(
                logging.LogRecord("forebay.log", level, "", 0, said, None, None)
            )


def _lost(lines: int) -> logging.LogRecord:
    text = "%d log lines were dropped: whoever reads the log is too slow"
    return logging.LogRecord("forebay.log", logging.WARNING, "", 0, text, (lines,), None)


def mask(text: str) -> str:
    """The text without the secrets of API keys; their public ids stay."""
    return _KEY.sub(r"fbk_\1_***", text) if "fbk_" in text else text


def configure(format_: str, level: str, access_log: bool) -> LogWriter:
    """Set the process's logging up; `stop()` the writer at the end to write what waits."""
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    root = logging.getLogger()
    root.handlers = [_BoundedHandler(lines)]
    root.setLevel(level)
    logging.getLogger(ACCESS).disabled = not access_log
    for noisy in ("alembic", "sqlalchemy", "asyncio", "aiosqlite", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return LogWriter(
        lines, sys.stderr, JsonFormatter() if format_ == "json" else ConsoleFormatter()
    )


def _timestamp(seconds: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"
