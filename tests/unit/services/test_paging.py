"""Page tokens: what a page begins behind, and which tokens are refused."""

from __future__ import annotations

import base64
from typing import Any, cast

import orjson
import pytest
from forebay.errors import InvalidArgument
from forebay.v1 import file_pb2, key_pb2, model_pb2
from forebay_server.services.paging import Page

Rows = list[tuple[float, str]]


def read(rows: Rows, token: str, size: int = 2, **fields: Any) -> tuple[Rows, str]:
    """A page of files."""
    request = file_pb2.ListFilesRequest(page_size=size, page_token=token, **fields)
    page, following = Page(request, 100, float, str).of(rows, lambda row: row)
    return list(page), following


def coded(*values: Any) -> str:
    return base64.urlsafe_b64encode(orjson.dumps(values)).decode().rstrip("=")


def values_of(token: str) -> list[Any]:
    return orjson.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))


def test_rows_that_come_and_go_move_no_other() -> None:
    rows: Rows = [(1.5, "a"), (1.5, "b"), (2.0, "c"), (2.5, "d"), (3.0, "e")]
    first, token = read(rows, "")
    assert first == rows[:2]
    changed = sorted([*rows[2:], (0.5, "z"), (1.5, "a0"), (2.25, "new")])
    second, token = read(changed, token)
    assert second == [(2.0, "c"), (2.25, "new")]
    third, token = read([*rows[:2], *rows[3:]], token)
    assert (third, token) == ([(2.5, "d"), (3.0, "e")], "")


def test_a_page_of_another_size_follows_and_a_full_last_page_has_no_token() -> None:
    rows: Rows = [(float(i), "x") for i in range(7)]
    _, token = read(rows, "", 3)
    assert read(rows, token, 4) == (rows[3:], "")
    assert read(rows, "", 7) == (rows, "")
    assert read([], "") == ([], "")
    assert read(rows, token, 0) == (rows[3:], "")


def test_a_token_is_of_its_list_alone() -> None:
    _, token = read([(1.0, "a"), (2.0, "b"), (3.0, "c")], "", purpose="batch")
    for fields in cast(
        Any, ({}, {"purpose": "vision"}, {"purpose": "batch", "oldest_first": True})
    ):
        with pytest.raises(InvalidArgument):
            read([], token, **fields)
    with pytest.raises(InvalidArgument):
        Page(key_pb2.ListKeysRequest(page_token=token), 50, float, str)
    # Where the first page began says nothing of the list.
    read([], token, purpose="batch", after="file-1")


def test_what_no_list_has_given_is_refused() -> None:
    _, token = read([(1.0, "a"), (2.0, "b"), (3.0, "c")], "")
    mine, time, name = values_of(token)
    assert (time, name) == (2.0, "b")
    assert read([(1.0, "a"), (2.0, "c")], coded(mine, time, name))[0] == [(2.0, "c")]
    for wrong in (
        "x",
        "éé",
        "=",
        f"{token}=",
        f" {token}",
        token[:-1],
        base64.urlsafe_b64encode(b"offset:2").decode(),
        coded(),
        coded(mine),
        coded(mine, time),
        coded(mine, time, name, 1),
        coded(mine, 2, name),
        coded(mine, True, name),
        coded(mine, time, None),
        coded(mine, time, [name]),
        coded(mine, time, "b\0"),
        coded("other", time, name),
        base64.urlsafe_b64encode(orjson.dumps({"a": 1})).decode().rstrip("="),
        base64.urlsafe_b64encode(b"7").decode().rstrip("="),
        base64.urlsafe_b64encode(b"[" * 150).decode().rstrip("="),
    ):
        with pytest.raises(InvalidArgument) as caught:
            read([], wrong)
        assert caught.value.violations[0].field == "page_token", wrong


def test_numbers_that_no_database_has_are_refused() -> None:
    request = model_pb2.ListModelsRequest(page_size=1)
    _, token = Page(request, 1, int).of([1, 2], lambda n: (n,))
    mine, _ = values_of(token)
    for number, good in ((7, True), (2**63 - 1, True), (2**63, False), (-(2**63), False)):
        request.page_token = coded(mine, number)
        if good:
            assert Page(request, 1, int).behind == (number,)
        else:
            with pytest.raises(InvalidArgument):
                Page(request, 1, int)
