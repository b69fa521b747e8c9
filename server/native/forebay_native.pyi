"""The fast lane: gRPC over HTTP/2 that gives Python all waiting calls of some methods as batches."""

from collections.abc import Mapping, Sequence
from pathlib import Path

__version__: str

class Call:
    """One unary call, ended by `Server.answer`. Forgotten unended, it is UNAVAILABLE."""

    def set_owner(self, owner: object) -> None:
        """What `Server.take` names when this call is gone."""

#: Call; index into the server's `methods`, behind them those of HTTP's routes; the request without
#: framing and compression; the
#: caller's text metadata, the last value of a repeated key (the same object for calls of a connection
#: that say the same: not to be changed); `ipv4:address:port`, `ipv6:[address]:port` or `unix:`;
#: seconds since the request was there in whole; seconds until the deadline, negative when it has
#: passed, None without one; what stands in the places of an HTTP route's path.
Arrival = tuple[Call, int, bytes, dict[str, str], str, float, float | None, list[str]]

class Server:
    """Listens as soon as it is made.

    Args:
        addresses: `address:port`s, or `unix:path`s. For port 0 the first takes any, and the others
            the same.
        methods: those that `take` gives: the path; the numbers of the request's fields (strings)
            that tell its queues apart, see `refuse_alike`; and whether a stream is the answer, see
            `send`. Calls of others go to `ordinary`.
        ordinary: path of the Unix socket of a gRPC server that serves all methods.
        overload: message and serialised google.rpc.Status of the refusal (RESOURCE_EXHAUSTED) when
            too much waits.
        too_large: serialised google.rpc.Status, without its message, of the refusal
            (RESOURCE_EXHAUSTED) of a message beyond `max_message_bytes`.
        id_prefix: what the ids of requests that leases answer begin with; a number follows.
        tls: contents of PEM files: certificate chain, key, authority of client certificates; None:
            the port is in the clear.
        http: a second port, for HTTP/1.1: `addresses`; `gateway`, the Unix socket that other requests
            go to; `routes`, paths with `{places}` whose POST requests `take` gives, each with
            answers (status, headers, body) by gRPC's status code for those that end in the
            extension, 0 for a body that is too large, the first for all others; `forwarded`, the
            headers that become metadata; `aside`, headers whose requests go to the gateway;
            `max_body_bytes`; `timeout_s`, the deadline where a request gives none; `idle_timeout_s`,
            for how long a connection may have no whole request, and the body of a request for the
            gateway may be waited for, of which each 500 bytes give back a second; `unreachable`, the answer when the gateway does not listen;
            `stalled`, the one to a request for it that does not come in whole.
        http_tls: as `tls`, for that port.

    Raises:
        OSError: it cannot listen there.
        ValueError: the TLS files are not what they should be; it names grpc.tls_... or http.tls_...
    """

    def __init__(
        self,
        addresses: Sequence[str],
        methods: Sequence[tuple[str, Sequence[int], bool]],
        ordinary: str,
        *,
        threads: int,
        max_message_bytes: int,
        max_header_bytes: int,
        max_connections: int,
        max_streams: int,
        max_waiting_calls: int,
        max_waiting_bytes: int,
        max_waiting_s: float,
        keepalive_s: float,
        keepalive_timeout_s: float,
        max_age_s: float,
        age_grace_s: float,
        receive_timeout_s: float,
        overload: tuple[str, bytes, float],
        too_large: bytes,
        id_prefix: str = "",
        tls: tuple[bytes, bytes, bytes | None] | None = None,
        http: Mapping[str, object] | None = None,
        http_tls: tuple[bytes, bytes, bytes | None] | None = None,
    ) -> None: ...
    @property
    def port(self) -> int:
        """The port in force; 0 for a Unix socket."""
    def take(self, most: int, timeout_s: float) -> tuple[list[Arrival], list[tuple[object, str]]]:
        """Wait for calls. Also gives news of calls that were taken, by their owners: `cancelled`
        (the client left), `late` (the deadline passed), `ready` (a stream's reader has caught up)."""
    @staticmethod
    def send(messages: Sequence[tuple[Call, bytes]]) -> list[int]:
        """Send messages of streams, in order; ignored for calls that ended. Gives the places of those
        whose readers are behind: more is not to be sent before `take` says that they are `ready`."""
    def answer_well(
        self,
        calls: Sequence[Call],
        payloads: Sequence[bytes],
        own: str,
        values: Sequence[str],
        shared: Sequence[tuple[str, str]],
    ) -> None:
        """End calls well. Trailers are `shared` for all, and `own` with each one's value. Raises
        ValueError for lists of different lengths."""
    def answer(
        self, answers: Sequence[tuple[Call, int, bytes, str, Sequence[tuple[str, str]]]]
    ) -> None:
        """End calls: (call, code, data, message, trailers). For code 0 the data is the response (of streams nothing);
        else it is a serialised google.rpc.Status or empty. Ends of calls that ended are ignored."""
    @property
    def http_port(self) -> int:
        """The HTTP port in force; 0 without one."""
    def answer_http(
        self, answers: Sequence[tuple[Call, int, bytes, Sequence[tuple[str, str]]]]
    ) -> None:
        """End calls that came by HTTP: (call, status, body, headers)."""
    def refuse_alike(
        self,
        call: Call,
        hold_s: float,
        gap_s: float,
        within_s: float | None,
        by_size: bool,
        message: str,
        details: bytes,
        retry_s: float,
    ) -> None:
        """For so long, refuse (RESOURCE_EXHAUSTED, with the details) calls of the same method whose
        telling fields say the same, if no more than `within_s` is left until their deadline, and if
        they are no smaller than this one, where `by_size` says that it matters. Then, where `gap_s` is
        over 0, for four times as long all but one in each such time. `retry_s`: after how long clients' retry
        policies are to come again; infinite: not at all."""
    def lease(
        self,
        call: Call,
        recipe: Recipe,
        line: str,
        calls: int,
        items: int,
        hold_s: float,
        trailers: Sequence[tuple[str, str]],
        counts: Sequence[tuple[str, int, bool]],
    ) -> Lease | None:
        """Lease the right to answer calls like this one: of the same method and metadata (but for
        x-request-id, traceparent, tracestate and baggage), whose requests differ in the recipe's records
        alone. None: no journal is set, or there are too many leases.

        Args:
            line: what a line of the journal begins with: `calls,items,0,0,0,0,engine_ms,0.0]` follows.
            calls, items: how many calls, and how many rows of all of them, may be answered.
            hold_s: for so long, unless it is renewed.
            trailers: of the answers.
            counts: trailers that say what is left: name, and what is added to the calls that are left;
                or to the items, where the last is True.
        """
    def wait_leased(self, timeout_s: float) -> bool:
        """Wait until a call was answered by a lease since the last time; False: none was."""
    def set_journal(self, path: Path | None) -> None:
        """The file that what leases answer is counted in before the answers leave. None, or one that cannot
        be opened: leases answer nothing."""
    def journal_state(self) -> tuple[bool, bool, list[bytes]]:
        """Whether the journal was written to, whether a line was left without an end, and lines that it
        did not take; since the last time."""
    def take_refusals(self) -> list[int]:
        """Calls that were refused without Python because too much waits, by method, since the last
        time."""
    def set_tls(
        self, certificate: bytes, key: bytes, client_ca: bytes | None = None, *, http: bool = False
    ) -> None:
        """For connections from now on, of the gRPC port or of that of HTTP. Raises ValueError, and keeps the old ones."""
    def drain_http(self) -> None:
        """Stop listening for HTTP, and end its connections as soon as they have no request. gRPC goes
        on. Idempotent."""
    def drain(self, timeout_s: float) -> bool:
        """Stop listening, send GOAWAY, wait for running calls. True when all connections ended."""
    def close(self) -> None:
        """End what is left. Idempotent."""
    def stats(self) -> dict[str, int]:
        """connections, refused_connections, waiting_calls, held_bytes, refused_calls,
        abandoned_calls."""

def check_tls(
    certificate: bytes, key: bytes, client_ca: bytes | None = None, *, http: bool = False
) -> None:
    """Raise the ValueError that a Server with these files would raise."""

def tree_visits(number: int) -> int | None:
    """How many nodes a row visits at most in the trees that ONNX Runtime has made of an operator with this
    `number`; None where there are none, or where they give a row several values."""

class Recipe:
    """How a lease answers a call: `before`, then `each` and the value of each row, then an ending.

    Args:
        field: of the request, which holds its records.
        trees: their number; see `tree_visits`.
        numbers: the records are rows of google.protobuf.Struct with these features: name, least, most, and
            whether it must be there. Others, and more, are Python's affair.
        raw: the only record is a tensor of float32, of so many bytes, whose rows have so many columns.
        double: values are doubles, else floats.
        endings: by the number of rows, from one on: bytes, and where in them the milliseconds that the
            work took go, as a double. None: Python answers.

    Raises:
        ValueError: there are no such trees; they want longer rows; a place is beyond the bytes.
    """

    def __init__(
        self,
        field: int,
        trees: int,
        numbers: Sequence[tuple[str, float, float, bool]] | None,
        raw: tuple[int, int] | None,
        before: bytes,
        each: bytes,
        double: bool,
        endings: Sequence[tuple[bytes, int | None] | None],
    ) -> None: ...

class Lease:
    """The right to answer some calls; see `Server.lease`."""

    def renew(
        self,
        calls: int,
        items: int,
        hold_s: float,
        trailers: Sequence[tuple[str, str]],
        counts: Sequence[tuple[str, int, bool]],
    ) -> bool:
        """Lend more, beside what is left, and for longer. False: it has ended."""
    def end(self) -> tuple[int, int]:
        """When this returns it answers nothing more. Gives the calls and items that were left."""
    def left(self) -> tuple[int, int]:
        """Calls and items that are left."""
    def take(self) -> list[tuple[int, str | None, str, list[float], float]]:
        """What was answered since the last time, by what is the same: rows of each, its `traceparent`; the end
        of each one's JSON line in the log (`"ms":..,"request_id":..,"peer":..}`), a line each; seconds of
        each; the model's seconds of all."""

class Split:
    """Messages that were taken apart by `split`."""

    def concat(self, members: Sequence[int], index: int, of: int, size: int) -> bytes | None:
        """Record `index` of each member, one after the other; None unless each member has `of`
        records, and this one has `size` bytes. Raises IndexError."""

def split(
    messages: Sequence[bytes], field: int
) -> tuple[Split, list[tuple[bytes, list[int]]], list[int]]:
    """Take messages apart at a length-delimited field: its values are the records, the other fields
    the head. Gives the places of the messages of each head; and of those that are malformed, have no
    records, or have a head of more than 4 KiB."""

def column_sizes(split: Split, members: Sequence[int], fields: tuple[int, int, int]) -> list[int]:
    """How many values the first column (record) of each member has, by what it says of itself; for
    `fields` see FeatureReader.columns."""

class FeatureReader:
    """Reads tables by the names of their features.

    Args:
        numbers: (name, least, most, needed) of features that take numbers and booleans.
        strings: (name, known values or none for any, needed) of features that take strings.
    """

    def __init__(
        self,
        numbers: Sequence[tuple[str, float, float, bool]],
        strings: Sequence[tuple[str, set[str], bool]],
    ) -> None: ...
    def rows(
        self, split: Split, members: Sequence[int]
    ) -> tuple[bytes, list[list[str]], list[tuple[int, int]], list[int]]:
        """Tables whose records are rows of google.protobuf.Struct. Of the members that are whole, one
        after the other: numbers [rows, numbers] as native float32 (NaN = missing, booleans are 0 and
        1); a column of strings for each of `strings` ("" = missing); member and number of rows. Then
        the members that are odd: malformed, with an unknown name, or with a value that its feature
        does not take."""
    def columns(
        self, split: Split, members: Sequence[int], fields: tuple[int, int, int]
    ) -> tuple[bytes, list[list[str]], list[tuple[int, int]], list[int]]:
        """The same for tables whose records are columns, and the numbers as [numbers, rows]. Odd are
        those, too, whose columns have a name twice, several lengths, or no values.

        Args:
            fields: of a column's message, its name, its values as doubles, its values as strings.
        """
