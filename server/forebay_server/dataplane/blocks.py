"""Small calls that share one item of the queue.

A row of a random forest takes 5 microseconds to compute, and several times that to carry through
queue, batch and completion as a request of its own. Calls that came together and fit together go as
one block: one item whose rows are theirs, one completion. What a block must not do is tie their
fates: a call that is cancelled or late ends by itself (its rows are computed and dropped), and when
the block fails for what may be one row's fault, each call is tried again alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from forebay.errors import Internal, InvalidArgument
from numpy.typing import NDArray

from forebay_server.core.call import Call, CallFacts
from forebay_server.core.interfaces import Completion, EngineRequest, Item
from forebay_server.dataplane.models import ModelAccess, ServedModel, guarded, located
from forebay_server.engines.arrays import rows_of

Tensors = Mapping[str, NDArray[Any]]
#: Gets calls that are answered together, the rows of each, and the outputs [rows, ...] by name, on
#: the thread that completed them. May end calls otherwise, and is told of those that have ended too.
Done = Callable[[Sequence[Call], Sequence[int], Tensors], None]


class Blocks:
    """The calls of one kind of request for one model, on their way.

    Args:
        field: the request's field that a refused input is blamed on.
        group: see Item.
    """

    def __init__(
        self, access: ModelAccess, model: ServedModel, field: str, done: Done, group: str = ""
    ) -> None:
        self._access = access
        self._model = model
        self._field = field
        self._done = done
        self._group = group

    def submit(self, tensors: Tensors, calls: Sequence[Call], rows: Sequence[int]) -> None:
        """Queue the calls' rows, which lie in `tensors` one after the other.

        A call of more rows than a batch holds is a block of several items, alone.
        """
        most = self._model.client.spec.policy.max_batch_size
        blocks: list[tuple[int, int, int, int]] = []  # first call, last, first row, last
        first = start = at = 0
        for i, n in enumerate(rows):
            if i > first and at - start + n > most:
                blocks.append((first, i, start, at))
                first, start = i, at
            at += n
        blocks.append((first, len(rows), start, at))
        requests = []
        for a, b, start, end in blocks:
            self._say(calls[a:b], rows[a:b])
            items = [
                Item(
                    {k: v[i : min(i + most, end)] for k, v in tensors.items()},
                    rows=min(most, end - i),
                    group=self._group,
                )
                for i in range(start, end, most)
            ]
            deadlines = [c.deadline for c in calls[a:b]]
            known = [d for d in deadlines if d is not None]
            latest = max(known) if len(known) == len(deadlines) else None
            requests.append(EngineRequest(items, calls[a].request_id, latest, calls=b - a))
        completions = self._access.submit(self._model, requests)
        for (a, b, start, end), completion in zip(blocks, completions, strict=True):
            if b - a == 1:
                calls[a].on_cancel(completion.cancel)
            own = {k: v[start:end] for k, v in tensors.items()}
            completion.add_done_callback(
                lambda c, m=calls[a:b], r=rows[a:b], t=own: self._completed(m, r, t, c)
            )

    def submit_whole(self, tensors: Tensors, call: Call) -> None:
        """Queue one call as one item, whatever its tensors' first dimensions are."""
        self._say([call], [1])
        request = EngineRequest([Item(tensors)], call.request_id, call.deadline)
        (completion,) = self._access.submit(self._model, [request])
        call.on_cancel(completion.cancel)
        completion.add_done_callback(lambda c: self._settle([call], [1], c))

    def _say(self, calls: Sequence[Call], rows: Sequence[int]) -> None:
        """Facts of the block's calls: one object for all that have as many rows."""
        model, version = self._model.name, self._model.version
        known: dict[int, CallFacts] = {}
        for call, n in zip(calls, rows, strict=True):
            facts = known.get(n)
            if facts is None:
                facts = known[n] = CallFacts(model, version, n)
            call.facts = facts

    def _completed(
        self, calls: Sequence[Call], rows: Sequence[int], tensors: Tensors, completion: Completion
    ) -> None:
        error = completion.error()
        tied = error is None and not _divides(completion.result(), sum(rows))
        if len(calls) > 1 and (tied or isinstance(error, InvalidArgument | Internal)):
            for call, n, own in each(calls, rows, tensors):
                guarded(call, lambda c=call, n=n, t=own: self.submit(t, [c], [n]))
            return
        if tied and len(completion.result()) > 1:
            most = self._model.client.spec.policy.max_batch_size
            text = f"have {sum(rows)} rows; the model does not answer row by row, and takes {most}"
            calls[0].fail(InvalidArgument.at(self._field, text))
            return
        self._settle(calls, rows, completion)

    def _settle(self, calls: Sequence[Call], rows: Sequence[int], completion: Completion) -> None:
        """Give the calls of a block its answer, or its error."""
        timing = completion.timing
        compute_s = timing.prepare_s + timing.execute_s + timing.finish_s
        row_s = timing.execute_s / max(1, timing.batch_rows)
        last: CallFacts | None = None
        for call in calls:
            facts = call.facts
            if facts is not last:
                facts.queue_s, facts.compute_s = timing.queue_s, compute_s
                facts.batch_rows = timing.batch_rows
                facts.engine_s = min(timing.execute_s, row_s * facts.items)
                last = facts
        error = completion.error()
        if error is not None:
            blamed = self._field if completion.failed_item is not None else None
            for call in calls:
                call.fail(located(error, blamed), error)
            return
        results: Sequence[Any] = completion.result()
        outputs: Tensors = results[0]
        if len(results) > 1:
            outputs = {k: np.concatenate([b[k] for b in results]) for k in results[0]}
        try:
            self._done(calls, rows, outputs)
        except Exception as e:
            for call in calls:
                guarded(call, lambda e=e: _again(e))


def _divides(results: Sequence[Any], rows: int) -> bool:
    """Whether each output has as many rows as went in, all of one shape."""
    for name in results[0]:
        parts = [result[name] for result in results]
        if sum(map(rows_of, parts)) != rows or len({p.shape[1:] for p in parts}) > 1:
            return False
    return True


def each(
    calls: Sequence[Call], rows: Sequence[int], tensors: Tensors
) -> Iterator[tuple[Call, int, Tensors]]:
    """The calls of a block, each with its own rows."""
    if len(calls) == 1:
        yield calls[0], rows[0], tensors
        return
    at = 0
    for call, n in zip(calls, rows, strict=True):
        yield call, n, {k: v[at : at + n] for k, v in tensors.items()}
        at += n


def answer_each(answer: Callable[[Call, int, Tensors], None]) -> Done:
    """A `Done` that answers call by call; what one answer raises ends its own call alone."""

    def done(calls: Sequence[Call], rows: Sequence[int], outputs: Tensors) -> None:
        for call, n, own in each(calls, rows, outputs):
            if call.code is None:
                guarded(call, lambda c=call, n=n, o=own: answer(c, n, o))

    return done


def _again(error: Exception) -> None:
    raise error
