"""Small calls that share one item of the queue.

A row of a random forest takes 5 microseconds to compute, and several times that to carry through
queue, batch and completion as a request of its own. Calls that came together and fit together go as
one block: one item whose rows are theirs, one completion. What a block must not do is tie their
fates: a call that is cancelled or late ends by itself (its rows are computed and dropped), and when
the block fails for what may be one row's fault, each call is tried again alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from forebay.errors import Internal, InvalidArgument
from numpy.typing import NDArray

from forebay_server.core.call import Call
from forebay_server.core.interfaces import Completion, EngineRequest, Item
from forebay_server.dataplane.models import ModelAccess, ServedModel, guarded, located

Tensors = Mapping[str, NDArray[Any]]


@dataclass(slots=True)
class Part:
    """One call's rows.

    Attributes:
        field: the request's field that a refused input is blamed on.
        done: gets the outputs [rows, ...] by name, on the thread that completed them.
    """

    call: Call
    rows: int
    field: str
    done: Callable[[Tensors], None]


def submit(
    access: ModelAccess,
    model: ServedModel,
    tensors: Tensors,
    parts: Sequence[Part],
    group: str = "",
) -> None:
    """Queue the rows of all parts, which lie in `tensors` one after the other, in blocks.

    Calls of more rows than a batch holds are blocks of several items, alone.
    """
    most = model.client.spec.policy.max_batch_size
    requests: list[EngineRequest] = []
    blocks: list[tuple[int, Sequence[Part]]] = []
    start = at = 0
    block: list[Part] = []

    def close() -> None:
        if not block:
            return
        items = [
            Item(
                {k: v[i : min(i + most, at)] for k, v in tensors.items()},
                rows=min(most, at - i),
                group=group,
            )
            for i in range(start, at, most)
        ]
        deadlines = [p.call.deadline for p in block]
        known = [d for d in deadlines if d is not None]
        latest = max(known) if len(known) == len(deadlines) else None
        requests.append(EngineRequest(items, block[0].call.request_id, latest, calls=len(block)))
        blocks.append((start, tuple(block)))
        block.clear()

    for part in parts:
        if block and at - start + part.rows > most:
            close()
            start = at
        block.append(part)
        at += part.rows
        facts = part.call.facts
        facts.model, facts.version, facts.items = model.name, model.version, part.rows
    close()
    for (first, members), completion in zip(blocks, access.submit(model, requests), strict=True):
        if len(members) == 1:
            members[0].call.on_cancel(completion.cancel)
        end = first + sum(p.rows for p in members)
        own = {k: v[first:end] for k, v in tensors.items()}
        completion.add_done_callback(
            lambda c, m=members, t=own: _completed(access, model, m, t, c, group)
        )


def _completed(
    access: ModelAccess,
    model: ServedModel,
    parts: Sequence[Part],
    tensors: Tensors,
    completion: Completion,
    group: str,
) -> None:
    error = completion.error()
    if len(parts) > 1 and isinstance(error, InvalidArgument | Internal):
        at = 0
        for part in parts:
            own = {k: v[at : at + part.rows] for k, v in tensors.items()}
            at += part.rows
            guarded(part.call, lambda p=part, t=own: submit(access, model, t, [p], group))
        return
    settle(parts, completion)


def settle(parts: Sequence[Part], completion: Completion) -> None:
    """Give the calls of a block its answer, each its rows, or its error."""
    error = completion.error()
    timing = completion.timing
    compute_s = timing.prepare_s + timing.execute_s + timing.finish_s
    row_s = timing.execute_s / max(1, timing.batch_rows)
    outputs: Tensors = {}
    if error is None:
        results: Sequence[Any] = completion.result()
        outputs = (
            results[0]
            if len(results) == 1
            else {k: np.concatenate([b[k] for b in results]) for k in results[0]}
        )
    at = 0
    for part in parts:
        call, rows = part.call, part.rows
        facts = call.facts
        facts.queue_s, facts.compute_s = timing.queue_s, compute_s
        facts.batch_rows = timing.batch_rows
        facts.engine_s = min(timing.execute_s, row_s * rows)
        if error is not None:
            blamed = part.field if completion.failed_item is not None else None
            call.fail(located(error, blamed), error)
            continue
        own = outputs if len(parts) == 1 else {k: v[at : at + rows] for k, v in outputs.items()}
        at += rows
        if call.code is None:
            guarded(call, lambda p=part, o=own: p.done(o))
