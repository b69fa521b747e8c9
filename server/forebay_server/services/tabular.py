"""TabularService: predictions from rows of named features."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from forebay.constraints import Validator
from forebay.errors import ForebayError, InvalidArgument
from forebay.v1 import common_pb2
from forebay.v1 import tabular_pb2 as pb
from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import Struct
from numpy.typing import NDArray

from forebay_server.core.call import Call, CallFacts, reply_all
from forebay_server.dataplane.blocks import Tensors, answer_each
from forebay_server.dataplane.models import ModelAccess, ServedModel, jobs_of
from forebay_server.dataplane.recipes import Ending, Recipe, most_rows, of_rows
from forebay_server.dataplane.records import AVAILABLE, take_apart
from forebay_server.dataplane.tabular import (
    TASKS,
    Column,
    Table,
    TabularJob,
    TabularOutcome,
    TabularPipeline,
    Value,
)
from forebay_server.services.base import Service, answers_in_order
from forebay_server.services.common import exactly_one

if TYPE_CHECKING:
    import forebay_native

#: What answers calls; see TabularPipeline.run_together.
Done = Callable[[ServedModel, Sequence[Call], Sequence[int], Tensors], None]
PREDICT = "/forebay.v1.TabularService/Predict"
_ROWS, _COLUMNS = pb.PredictRequest.ROWS_FIELD_NUMBER, pb.PredictRequest.COLUMNS_FIELD_NUMBER
_COLUMN = (
    pb.FeatureColumn.NAME_FIELD_NUMBER,
    pb.FeatureColumn.NUMBERS_FIELD_NUMBER,
    pb.FeatureColumn.STRINGS_FIELD_NUMBER,
)
#: Heads (requests without their tables) that are remembered.
_HEADS = 256
_TYPES = {
    "number": pb.FEATURE_TYPE_NUMBER,
    "string": pb.FEATURE_TYPE_STRING,
    "boolean": pb.FEATURE_TYPE_BOOLEAN,
}


class TabularService(Service):
    """See protos/forebay/v1/tabular.proto."""

    name = "forebay.v1.TabularService"

    def __init__(self, tables: TabularPipeline, access: ModelAccess, validator: Validator) -> None:
        self._tables = tables
        self._access = access
        self._validator = validator
        # Callers repeat theirs from call to call.
        self._head = lru_cache(_HEADS)(self._read_head)

    def predict_raw(self, calls: Sequence[Call]) -> list[Call]:
        """Predict, where tables can be read without parsing their requests."""
        if not AVAILABLE:
            return list(calls)
        odd: list[Call] = []
        left: Sequence[Call] = calls
        for field, columns in ((_ROWS, None), (_COLUMNS, _COLUMN)):
            if not left:
                break
            taken, left = take_apart(left, field)
            for head, own, tables in taken:
                known = self._head(head)
                if known is None:
                    odd += own
                else:
                    done = self._repeatable(head, *known) if columns is None else _reply_all
                    odd += self._tables.run_together(own, *known, tables, done, columns)
        return [*odd, *left]

    def _repeatable(self, head: bytes, ref: str, sticky_key: str) -> Done:
        """`_reply_all`, which also says how the transport may answer such calls."""

        def done(
            model: ServedModel, calls: Sequence[Call], rows: Sequence[int], outputs: Tensors
        ) -> None:
            if model.client.trees is not None:
                valid = partial(self._access.still, model, ref, TASKS, sticky_key)
                most = self._tables.max_items
                calls[0].recipe = Recipe(head, model, lambda: _recipe(model, most), valid)
            _reply_all(model, calls, rows, outputs)

        return done

    def _read_head(self, data: bytes) -> tuple[str, str] | None:
        """The model and the sticky key of a request without its table; None where it is not what it
        should be."""
        try:
            request = pb.PredictRequest.FromString(data)
            self._validator.check(request)
        except (DecodeError, ForebayError):
            return None
        if request.rows or request.columns:
            return None
        return request.model, request.sticky_key

    def predict(self, calls: Sequence[Call]) -> None:
        """Predict."""
        self._tables.run(jobs_of(calls, lambda c: _job(c, cast(pb.PredictRequest, c.request))))

    def predict_stream(
        self, call: Call, requests: AsyncIterator[pb.PredictStreamRequest]
    ) -> AsyncIterator[object]:
        """PredictStream."""
        return answers_in_order(
            call,
            requests,
            PREDICT,
            self._predict_one,
            self._validator,
            lambda r: r.request,
            lambda data: pb.PredictStreamResponse(response=pb.PredictResponse.FromString(data)),
        )

    def _predict_one(self, calls: Sequence[Call]) -> None:
        """A request of a stream: its rows are read as those of calls are."""
        for call in calls:
            call.message = cast(pb.PredictRequest, call.request).SerializeToString()
        left = self.predict_raw(calls)
        if left:
            self.predict(left)

    async def get_signature(self, call: Call) -> pb.GetSignatureResponse:
        """GetSignature."""
        request = cast(pb.GetSignatureRequest, call.request)
        model = await self._access.resolve_async(call, request.model, TASKS)
        head = model.manifest.tabular_head
        response = pb.GetSignatureResponse(
            served_by=common_pb2.ServedBy(model=model.name, version=model.version),
            target=pb.Target(
                name=head.target.name, unit=head.target.unit or "", classes=head.classes or ()
            ),
            metrics=model.manifest.number_metrics,
        )
        for f in head.features:
            response.features.add(
                name=f.name,
                type=_TYPES[f.type],
                nullable=f.nullable,
                min=f.min,
                max=f.max,
                categories=f.categories or (),
                description=f.description or "",
                unit=f.unit or "",
            )
        return response


def _job(call: Call, request: pb.PredictRequest) -> TabularJob:
    def table() -> Table:
        if exactly_one(rows=request.rows, columns=request.columns) == "rows":
            return _from_rows(request.rows)
        return _from_columns(request.columns)

    rows = len(request.rows) or max(
        (len(c.strings) or len(c.numbers) for c in request.columns), default=0
    )
    return TabularJob(
        call, request.model, rows, table, lambda o: _reply(call, o), sticky_key=request.sticky_key
    )


def _from_rows(rows: Sequence[Struct]) -> Table:
    columns: dict[str, list[Value]] = {}
    for i, row in enumerate(rows):
        for name, value in row.fields.items():
            kind = value.WhichOneof("kind")
            if kind == "number_value":
                plain: Value = value.number_value
            elif kind == "string_value":
                plain = value.string_value
            elif kind == "bool_value":
                plain = value.bool_value
            elif kind in ("null_value", None):
                plain = None
            else:
                what = "an object" if kind == "struct_value" else "a list"
                raise InvalidArgument.at(
                    f"rows[{i}].{name}", f"is {what}; a number, string, boolean or null is needed"
                )
            column = columns.get(name)
            if column is None:
                column = cast("list[Value]", [None] * i)
                columns[name] = column
            elif len(column) < i:
                column.extend([None] * (i - len(column)))
            column.append(plain)
    for column in columns.values():
        column.extend([None] * (len(rows) - len(column)))
    return Table(cast(Any, columns), len(rows), lambda name, i: f"rows[{i}].{name}")


def _from_columns(columns: Sequence[pb.FeatureColumn]) -> Table:
    out: dict[str, Column] = {}
    sizes: dict[str, int] = {}
    place = {c.name: i for i, c in enumerate(columns)}
    for i, column in enumerate(columns):
        if column.name in out:
            raise InvalidArgument.at(f"columns[{i}].name", f"{column.name!r} is there twice")
        if column.numbers and column.strings:
            raise InvalidArgument.at(
                f"columns[{i}]", "has numbers and strings; exactly one of them must be given"
            )
        if column.strings:
            out[column.name] = column.strings
        else:
            out[column.name] = _numbers(column)
        sizes[column.name] = len(out[column.name])
    rows = max(sizes.values())
    for name, size in sizes.items():
        if size != rows:
            raise InvalidArgument.at(
                f"columns[{place[name]}]", f"has {size} values; another column has {rows}"
            )
    if rows == 0:
        raise InvalidArgument.at("columns[0]", "has no values")

    def path(name: str, i: int) -> str:
        # A feature without a column is missing in every row.
        return f"columns[{place[name]}] value {i}" if name in place else f"columns ({name})"

    return Table(out, rows, path)


def _numbers(column: pb.FeatureColumn) -> NDArray[np.float64]:
    """A column's numbers, without a Python float for each: written, they are its last field, in one
    piece of eight bytes each."""
    n = len(column.numbers)
    data = column.SerializeToString()
    at = len(data) - 8 * n
    if n and data.endswith(_packed(8 * n), 0, at):
        return np.frombuffer(data, "<f8", offset=at)
    return np.fromiter(column.numbers, np.float64, n)


@lru_cache
def _packed(size: int) -> bytes:
    """What stands before so many bytes of numbers."""
    out = [pb.FeatureColumn.NUMBERS_FIELD_NUMBER << 3 | 2]
    while size > 0x7F:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([*out, size])


@dataclass(slots=True)
class _Answer:
    """Predictions, and the serialised rest of their response: fields may come in pieces."""

    predictions: pb.PredictResponse
    facts: bytes

    def SerializeToString(self) -> bytes:
        return self.predictions.SerializeToString() + self.facts


def _facts(f: CallFacts) -> bytes:
    """What a response says beside its predictions."""
    response = pb.PredictResponse(
        timing=common_pb2.Timing(
            queue_ms=round(f.queue_s * 1e3, 3),
            compute_ms=round(f.compute_s * 1e3, 3),
            batch_rows=f.batch_rows,
        ),
    )
    return _served(f.model, f.version, f.items) + response.SerializeToString()


@lru_cache(1024)
def _served(model: str, version: int, items: int) -> bytes:
    """What many responses say alike."""
    response = pb.PredictResponse(
        served_by=common_pb2.ServedBy(model=model, version=version),
        usage=common_pb2.Usage(items=items),
    )
    return response.SerializeToString()


def _reply(call: Call, outcome: TabularOutcome) -> None:
    head = outcome.model.manifest.tabular_head
    response = pb.PredictResponse()
    add = response.predictions.add
    given = outcome.outputs[head.output].reshape(outcome.rows)
    odd = outcome.warnings
    if head.classes is None:
        if not odd:
            reply_all([call], [_written(given) + _facts(call.facts)])
            return
        for i, value in enumerate(given.tolist()):
            add(value=value, warnings=odd.get(i, ()))
    else:
        scores = outcome.outputs.get(head.probabilities_output or "")
        for i, label in enumerate(given.tolist()):
            one = add(label=str(label), warnings=odd.get(i, ()))
            if scores is not None:
                for j in np.argsort(-scores[i], kind="stable").tolist():
                    one.probabilities.add(label=head.classes[j], score=float(scores[i, j]))
    call.reply(_Answer(response, _facts(call.facts)))


def _value_piece() -> bytes:
    """A response's bytes before the value of a prediction that has nothing else."""
    value = 1.5
    data = pb.PredictResponse(predictions=[pb.Prediction(value=value)]).SerializeToString()
    before, double, after = data.partition(struct.pack("<d", value))
    assert double and not after
    return before


_VALUE = _value_piece()
_PIECE = np.dtype([("before", f"S{len(_VALUE)}"), ("value", "<f8")])


def _written(values: NDArray[Any]) -> bytes:
    """The bytes of predictions that have a value alone, `_PIECE.itemsize` each."""
    out = np.empty(len(values), _PIECE)
    out["before"] = _VALUE
    out["value"] = values
    return out.tobytes()


def _recipe(model: ServedModel, max_items: int) -> forebay_native.Recipe | None:
    """The same answers, as the extension writes them."""
    endings: list[Ending] = []
    for rows in range(1, min(max_items, most_rows(model)) + 1):
        ms = 1.5
        facts = CallFacts(model.name, model.version, rows, compute_s=ms / 1e3, batch_rows=rows)
        ending = _facts(facts)
        endings.append((ending, ending.rindex(struct.pack("<d", ms))))
    return of_rows(model, _ROWS, _VALUE, endings) if endings else None


def _reply_all(
    model: ServedModel, calls: Sequence[Call], rows: Sequence[int], outputs: Tensors
) -> None:
    """Answer calls whose rows raised no question. Values are written without a message each: a
    test holds the bytes to mean the same."""
    head = model.manifest.tabular_head
    if head.classes is not None:

        def answer(call: Call, n: int, own: Tensors) -> None:
            _reply(call, TabularOutcome(model, n, own, {}))

        answer_each(answer)(calls, rows, outputs)
        return
    data = _written(outputs[head.output].reshape(sum(rows)))
    payloads = []
    known: CallFacts | None = None
    facts, at = b"", 0
    for call, n in zip(calls, rows, strict=True):
        if call.facts is not known:
            known = call.facts
            facts = _facts(known)
        end = at + n * _PIECE.itemsize
        payloads.append(data[at:end] + facts)
        at = end
    reply_all(calls, payloads)
