"""kill -9 at random moments of uploads, ingest, deletes: no acknowledged document is lost, none is
half there.

FOREBAY_KILLS sets how often the server is killed, 4 by default; FOREBAY_SEED when.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from forebay.v1 import knowledge_pb2 as pb
from forebay.v1 import knowledge_pb2_grpc

from tests.conftest import copy_models
from tests.integration.server_process import SERVE_WITH_CONSTANT_UPKEEP, StartProcess
from tests.integration.test_knowledge import create, wait

KILLS = int(os.environ.get("FOREBAY_KILLS", "4"))
PIECE = 1000


class Ledger:
    """What was asked of the server, and what it acknowledged."""

    def __init__(self) -> None:
        self.sent: dict[str, str] = {}  # name -> text
        self.acked: dict[str, str] = {}  # name -> id
        self.deleting: set[str] = set()
        self.deleted: set[str] = set()


def text_of(number: int, sentences: int) -> str:
    return " ".join(f"Note {number} says in line {i} that all is well." for i in range(sentences))


def upload(stub, name: str, text: str) -> str:
    def messages() -> Iterator[pb.UploadDocumentRequest]:
        yield pb.UploadDocumentRequest(header={"knowledge_base": "k"})
        data = text.encode()
        for start in range(0, len(data), PIECE):
            piece = {"path": name, "data": data[start : start + PIECE]}
            yield pb.UploadDocumentRequest(chunk=piece)

    return stub.UploadDocument(messages(), timeout=30).documents[0].document.id


@pytest.mark.slow
@pytest.mark.timeout(180 + 30 * KILLS)
def test_kill_9_loses_no_acknowledged_document(
    starters: Path, tmp_path: Path, start_process: StartProcess
) -> None:
    home = tmp_path / "home"
    copy_models(starters, home / "models", "minilm")
    chance = random.Random(os.environ.get("FOREBAY_SEED", "1"))
    ledger = Ledger()
    number = 0
    server = start_process(*SERVE_WITH_CONSTANT_UPKEEP)
    stub = knowledge_pb2_grpc.KnowledgeServiceStub(server.channel)
    create(stub, "k", language="en", chunks={"tokens": 40, "overlap": 0})
    for _ in range(KILLS):
        stopping = threading.Event()

        def work(stub=stub, stopping=stopping) -> None:
            nonlocal number
            while not stopping.is_set():
                number += 1
                name, text = f"{number}.txt", text_of(number, chance.randint(1, 25))
                ledger.sent[name] = text
                try:
                    ledger.acked[name] = upload(stub, name, text)
                    if chance.random() < 0.3:
                        gone = chance.choice(sorted(ledger.acked))
                        ledger.deleting.add(gone)
                        remove(stub, ledger.acked[gone])
                        ledger.deleted.add(gone)
                        ledger.acked.pop(gone)
                except grpc.RpcError:
                    return
                time.sleep(chance.uniform(0.0, 0.15))

        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(chance.uniform(0.05, 1.2))
        server.kill()
        stopping.set()
        thread.join(30)
        server = start_process(*SERVE_WITH_CONSTANT_UPKEEP)
        stub = knowledge_pb2_grpc.KnowledgeServiceStub(server.channel)
        nothing_is_half_visible(stub, ledger)
        check(stub, ledger, home)
    assert len(ledger.acked) + len(ledger.deleted) >= KILLS


def remove(stub, document: str) -> None:
    request = pb.DeleteDocumentRequest(knowledge_base="k", document=document)
    stub.DeleteDocument(request, timeout=30)


def chunks_of(stub, document: str) -> list[pb.Chunk]:
    request = pb.RetrieveRequest(knowledge_base="k", query="note well")
    request.retrieval.top_k = 100
    request.retrieval.mode = 2
    only = request.retrieval.filter.equals
    only.key = "document"
    only.value.string_value = document
    return sorted(stub.Retrieve(request).chunks, key=lambda c: c.start)


def whole(found: list[pb.Chunk], text: str) -> bool:
    """Whether chunks without overlap cover a text, each part once."""
    return "".join("".join(c.text.split()) for c in found) == "".join(text.split())


def nothing_is_half_visible(stub, ledger: Ledger) -> None:
    """While what was cut off is still being worked on."""
    for name, document in list(ledger.acked.items()):
        found = chunks_of(stub, document)
        assert not found or whole(found, ledger.sent[name]), name


def check(stub, ledger: Ledger, home: Path) -> None:
    documents = wait(stub, "k")
    assert all(d.status == pb.DOCUMENT_STATUS_READY for d in documents.values())
    for name, document in ledger.acked.items():
        if name not in documents:
            assert name in ledger.deleting, f"{name} was acknowledged and is lost"
            continue
        assert documents[name].id == document
    assert not ledger.deleted & set(documents), "a removed document is back"
    for name, document in documents.items():
        found = chunks_of(stub, document.id)
        assert whole(found, ledger.sent[name]) and len(found) == document.chunks, name
        asked = pb.GetDocumentRequest(knowledge_base="k", document=document.id, with_text=True)
        assert stub.GetDocument(asked).pages[0].text == ledger.sent[name]
    base = stub.GetKnowledgeBase(pb.GetKnowledgeBaseRequest(knowledge_base="k")).knowledge_base
    assert base.chunks == sum(d.chunks for d in documents.values()), "chunks of no document"
    ids = {d.id for d in documents.values()}
    kept = {p.name.split(".")[0] for p in (home / "knowledge").rglob("*.*")}
    assert kept == ids, "files of no document"
    for name in list(ledger.acked):
        if name not in documents:
            ledger.deleted.add(name)
            ledger.acked.pop(name)
