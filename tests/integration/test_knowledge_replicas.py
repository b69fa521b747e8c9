"""Knowledge bases of two servers that share a PostgreSQL: what one does is the other's too."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from forebay.v1 import knowledge_pb2 as pb
from forebay.v1 import knowledge_pb2_grpc
from forebay_server.knowledge import claims
from forebay_server.storage import knowledge as stored
from forebay_server.storage.tables import collection_points, collections, knowledge_documents

from tests.conftest import Live, NewDatabase, Start
from tests.integration.server_process import ServerProcess
from tests.integration.test_faults import deterministic, word_id
from tests.integration.test_knowledge import create, upload, wait

Stub = knowledge_pb2_grpc.KnowledgeServiceStub
#: Claims that run out in two seconds.
SHORT = """
from forebay_server.knowledge import claims
from forebay_server.storage import knowledge
knowledge.OWNED_S, claims.CLAIM_EVERY_S = 2.0, 0.2
from forebay_cli.main import app
app(["serve"])
"""
TEXT = b"The code of the first door is xylophone."


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """As SHORT, for the servers of this process."""
    monkeypatch.setattr(stored, "OWNED_S", 2.0)
    monkeypatch.setattr(claims, "CLAIM_EVERY_S", 0.2)


@pytest.fixture(scope="module")
def url(postgres: NewDatabase, lane: str) -> str:
    return postgres()


@pytest.fixture(scope="module")
def quick(starters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes no time."""
    root = tmp_path_factory.mktemp("quick")
    return deterministic(root, starters, "numbers", "default_for: [embedding]\n")


@pytest.fixture(scope="module")
def slow(starters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same one, which takes a second."""
    yaml = "default_for: [embedding]\nengine_options: {base_s: 1.0}\n"
    return deterministic(tmp_path_factory.mktemp("slow"), starters, "numbers", yaml)


@pytest.fixture(scope="module")
def new_home(tmp_path_factory: pytest.TempPathFactory, lane: str) -> Callable[[], Path]:
    """Makes homes that share their knowledge folder alone."""
    shared = tmp_path_factory.mktemp("shared")

    def new() -> Path:
        home = tmp_path_factory.mktemp("home")
        (home / "knowledge").symlink_to(shared)
        return home

    return new


@pytest.fixture(scope="module")
def pair(
    start: Start, url: str, quick: Path, slow: Path, new_home: Callable[[], Path]
) -> list[Live]:
    """Two servers; the second one embeds slowly."""
    return [start(m, storage__database=url, home=new_home()) for m in (quick, slow)]


@pytest.fixture(scope="module")
def first(pair: list[Live]) -> Stub:
    return Stub(pair[0].channel)


@pytest.fixture(scope="module")
def second(pair: list[Live]) -> Stub:
    return Stub(pair[1].channel)


def until(seen: Callable[[], Any], seconds: float = 30) -> Any:
    """What is seen at last."""
    deadline = time.monotonic() + seconds
    while not (found := seen()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def get(stub: Stub, base: str, document: str) -> pb.Document:
    return stub.GetDocument(pb.GetDocumentRequest(knowledge_base=base, document=document)).document


def until_it_is(stub: Stub, base: str, document: str, status: pb.DocumentStatus) -> None:
    until(lambda: get(stub, base, document).status == status)


def refused(call: Callable[[], Any]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code()


def names(stub: Stub) -> set[str]:
    found = stub.ListKnowledgeBases(pb.ListKnowledgeBasesRequest(page_size=100))
    return {b.name for b in found.knowledge_bases}


def remove(stub: Stub, base: str) -> pb.DeleteKnowledgeBaseResponse:
    return stub.DeleteKnowledgeBase(pb.DeleteKnowledgeBaseRequest(knowledge_base=base))


def ask(stub: Stub, base: str) -> pb.AskResponse:
    # By a model that only makes numbers, a sentence is the nearest to itself.
    return stub.Ask(pb.AskRequest(knowledge_base=base, question=TEXT.decode()))


def rows(live: Live, query: sa.Select[Any]) -> list[Any]:
    async def read() -> list[Any]:
        async with live.server._database.read() as db:
            return list(await db.execute(query))

    return live.run(read())


def held(live: Live) -> set[str]:
    """Documents that a server works on."""
    assert live.server._retrieval is not None
    return live.server._retrieval.ingest._claims._held


def chunks_of(live: Live, document: str) -> list[str]:
    """Ids of a document's chunks in the database."""
    p = collection_points
    return [
        r[0] for r in rows(live, sa.select(p.c.point_id).where(p.c.point_id.contains(document)))
    ]


def files_of(live: Live, document: str) -> list[Path]:
    return [p for p in (live.settings.home / "knowledge").rglob("*") if document in p.name]


def test_a_base_is_made_on_one_filled_on_the_other_and_asked_on_both(
    first: Stub, second: Stub
) -> None:
    create(first, "shared", language="en")
    assert refused(lambda: create(second, "shared")) is grpc.StatusCode.ALREADY_EXISTS
    upload(second, "shared", ("doors.txt", TEXT))
    (document,) = wait(first, "shared").values()
    assert document.status == pb.DOCUMENT_STATUS_READY
    answer = until(lambda: [a for a in [ask(first, "shared")] if a.citations])[0]
    assert answer.citations[0].quote == TEXT.decode()
    assert answer.citations[0].verified
    request = pb.GetDocumentRequest(knowledge_base="shared", document=document.id, with_text=True)
    assert first.GetDocument(request).pages[0].text == TEXT.decode()
    assert "shared" in names(first) & names(second)
    assert upload(first, "shared", ("again.txt", TEXT))[0].duplicate


def test_a_base_that_is_removed_on_one_is_gone_on_the_other(first: Stub, second: Stub) -> None:
    create(first, "gone")
    known = pb.GetKnowledgeBaseRequest(knowledge_base="gone")
    second.GetKnowledgeBase(known)
    remove(first, "gone")
    assert "gone" not in names(second)
    assert refused(lambda: second.GetKnowledgeBase(known)) is grpc.StatusCode.NOT_FOUND
    create(second, "gone")
    first.GetKnowledgeBase(known)
    remove(second, "gone")
    assert refused(lambda: remove(first, "gone")) is grpc.StatusCode.NOT_FOUND


def test_a_base_that_is_removed_elsewhere_is_forgotten_soon(first: Stub, second: Stub) -> None:
    create(second, "forgotten")
    asked = pb.ListDocumentsRequest(knowledge_base="forgotten")
    first.ListDocuments(asked)
    remove(second, "forgotten")

    def unknown() -> bool:
        try:
            first.ListDocuments(asked)
        except grpc.RpcError as e:
            return e.code() is grpc.StatusCode.NOT_FOUND
        return False

    until(unknown, 10)


def test_a_document_that_is_removed_on_one_while_the_other_ingests_it_leaves_nothing(
    pair: list[Live], first: Stub, second: Stub
) -> None:
    create(first, "cut")
    document = upload(second, "cut", ("a.txt", TEXT))[0].document.id
    until_it_is(first, "cut", document, pb.DOCUMENT_STATUS_EMBEDDING)
    request = pb.DeleteDocumentRequest(knowledge_base="cut", document=document)
    first.DeleteDocument(request)
    until(lambda: document not in held(pair[1]))
    assert not chunks_of(pair[0], document)
    assert not files_of(pair[0], document)
    assert not wait(first, "cut")


def test_a_document_that_is_removed_on_one_as_soon_as_the_other_is_done_leaves_nothing(
    pair: list[Live], first: Stub, second: Stub
) -> None:
    create(first, "done")
    first.ListDocuments(pb.ListDocumentsRequest(knowledge_base="done"))
    document = upload(second, "done", ("a.txt", TEXT))[0].document.id
    until_it_is(first, "done", document, pb.DOCUMENT_STATUS_READY)
    request = pb.DeleteDocumentRequest(knowledge_base="done", document=document)
    assert first.DeleteDocument(request).chunks == 1
    assert not chunks_of(pair[0], document)
    assert not files_of(pair[0], document)


def test_a_document_that_is_ingested_again_elsewhere_has_each_chunk_once(
    pair: list[Live], first: Stub, second: Stub
) -> None:
    create(first, "twice")
    document = upload(second, "twice", ("a.txt", TEXT))[0].document.id
    until_it_is(first, "twice", document, pb.DOCUMENT_STATUS_READY)
    request = pb.ReingestDocumentRequest(knowledge_base="twice", document=document)
    first.ReingestDocument(request)
    assert wait(first, "twice")["a.txt"].status == pb.DOCUMENT_STATUS_READY
    assert chunks_of(pair[0], document) == [f"{document}.2.0"]


def test_a_base_that_is_removed_on_one_while_the_other_ingests_leaves_nothing(
    pair: list[Live], first: Stub, second: Stub
) -> None:
    create(first, "base")
    ids = [d.document.id for d in upload(second, "base", ("a.txt", TEXT), ("b.txt", b"Other."))]
    until(lambda: any(get(first, "base", d).status == 3 for d in ids))
    remove(first, "base")
    until(lambda: not held(pair[1]) & set(ids))
    d, c = knowledge_documents, collections
    assert not rows(pair[0], sa.select(d.c.id).where(d.c.id.in_(ids)))
    assert not any(chunks_of(pair[0], i) or files_of(pair[0], i) for i in ids)
    stays = {f".knowledge-{p.name}" for p in (pair[0].settings.home / "knowledge").iterdir()}
    assert stays <= {r[0] for r in rows(pair[0], sa.select(c.c.name))}


def test_a_server_that_starts_leaves_alone_what_another_one_works_on(
    pair: list[Live],
    second: Stub,
    start: Start,
    url: str,
    quick: Path,
    new_home: Callable[[], Path],
) -> None:
    create(second, "busy")
    embedded = upload(second, "busy", ("embedded.txt", TEXT))[0].document.id
    going_on, begun = threading.Event(), threading.Event()

    def messages() -> Iterator[pb.UploadDocumentRequest]:
        yield pb.UploadDocumentRequest(header={"knowledge_base": "busy"})
        yield pb.UploadDocumentRequest(chunk={"path": "sent.txt", "data": b"Half is here, "})
        begun.set()
        assert going_on.wait(60)
        yield pb.UploadDocumentRequest(chunk={"path": "sent.txt", "data": b"and now the rest."})

    sending = second.UploadDocument.future(messages())
    assert begun.wait(10)
    folder = pair[0].settings.home / "knowledge"
    until(lambda: [p for p in folder.rglob("*.file") if not p.name.startswith(embedded)])
    third = start(quick, storage__database=url, home=new_home())
    assert not held(third)
    going_on.set()
    sending.result(30)
    documents = wait(second, "busy")
    assert {d.status for d in documents.values()} == {pb.DOCUMENT_STATUS_READY}
    assert chunks_of(third, embedded) == [f"{embedded}.1.0"]
    third.stop()


@pytest.fixture
def doomed(
    starters: Path, tmp_path: Path, url: str, lane: str
) -> Iterator[Callable[[Path], ServerProcess]]:
    """Starts a server in a process of its own whose model hangs where a text has the word `hang`."""
    yaml = f"default_for: [embedding]\nengine_options: {{hang_on: {word_id(starters, 'hang')}}}\n"
    models = deterministic(tmp_path / "models", starters, "numbers", yaml)
    running: list[ServerProcess] = []

    def run(home: Path) -> ServerProcess:
        settings = {"STORAGE__DATABASE": url, "MODELS__ROOT": str(models), "GRPC__LANE": lane}
        environ = {f"FOREBAY_{name}": value for name, value in settings.items()}
        running.append(ServerProcess(home, "-c", SHORT, **environ))
        running[-1].wait()
        return running[-1]

    yield run
    for server in running:
        server.kill()


def owned_until(live: Live, document: str) -> float:
    d = knowledge_documents
    ((until_then,),) = rows(live, sa.select(d.c.owned_until).where(d.c.id == document))
    return until_then or 0.0


def begin_and_kill(server: ServerProcess, watching: Live, base: str) -> str:
    """A document in whose middle the server is killed."""
    stub = Stub(watching.channel)
    document = upload(Stub(server.channel), base, ("hang.txt", b"Some doors hang. " + TEXT))
    name = document[0].document.id
    until_it_is(stub, base, name, pb.DOCUMENT_STATUS_EMBEDDING)
    claimed = owned_until(watching, name)
    until(lambda: owned_until(watching, name) > claimed + 2)  # longer than its first claim held
    assert get(stub, base, name).status == pb.DOCUMENT_STATUS_EMBEDDING
    server.kill()
    return name


def test_documents_of_a_killed_server_go_on_elsewhere(
    pair: list[Live],
    first: Stub,
    doomed: Callable[[Path], ServerProcess],
    new_home: Callable[[], Path],
) -> None:
    create(first, "killed", language="en")
    document = begin_and_kill(doomed(new_home()), pair[0], "killed")
    assert wait(first, "killed")["hang.txt"].status == pb.DOCUMENT_STATUS_READY
    assert chunks_of(pair[0], document) == [f"{document}.1.0"]
    answer = until(lambda: [a for a in [ask(first, "killed")] if a.citations])[0]
    assert answer.citations[0].verified


def test_documents_whose_file_is_elsewhere_wait_for_the_server_that_has_it(
    pair: list[Live],
    first: Stub,
    doomed: Callable[[Path], ServerProcess],
    start: Start,
    url: str,
    quick: Path,
    tmp_path: Path,
) -> None:
    create(first, "apart")
    home = tmp_path / "apart"
    document = begin_and_kill(doomed(home), pair[0], "apart")
    until(lambda: owned_until(pair[0], document) + 1 < time.time())  # others have looked since
    assert get(first, "apart", document).status == pb.DOCUMENT_STATUS_EMBEDDING
    again = start(quick, storage__database=url, home=home)
    assert wait(first, "apart")["hang.txt"].status == pb.DOCUMENT_STATUS_READY
    asked = pb.GetDocumentRequest(knowledge_base="apart", document=document, with_text=True)
    assert Stub(again.channel).GetDocument(asked).pages[0].text.startswith("Some doors")
    assert refused(lambda: first.GetDocument(asked)) is grpc.StatusCode.UNAVAILABLE
    answer = until(lambda: [a for a in [ask(first, "apart")] if a.citations])[0]
    assert "xylophone" in answer.citations[0].quote
    assert not answer.citations[0].verified
    request = pb.ReingestDocumentRequest(knowledge_base="apart", document=document)
    first.ReingestDocument(request)
    assert wait(first, "apart")["hang.txt"].status == pb.DOCUMENT_STATUS_READY
    request.password = "secret"
    assert refused(lambda: first.ReingestDocument(request)) is grpc.StatusCode.UNAVAILABLE
    again.stop()


def test_evaluations_are_seen_and_removed_from_the_other_server(first: Stub, second: Stub) -> None:
    create(first, "measured")
    upload(first, "measured", ("a.txt", TEXT))
    wait(first, "measured")
    request = pb.StartEvaluationRequest(knowledge_base="measured", name="e")
    request.items.add(query="Which code?", answers=["xylophone"])
    made = first.StartEvaluation(request).evaluation
    asked = pb.GetEvaluationRequest(knowledge_base="measured", evaluation=made.id)
    until(lambda: second.GetEvaluation(asked).evaluation.results)
    listed = second.ListEvaluations(pb.ListEvaluationsRequest(knowledge_base="measured"))
    assert [e.id for e in listed.evaluations] == [made.id]
    second.DeleteEvaluation(
        pb.DeleteEvaluationRequest(knowledge_base="measured", evaluation=made.id)
    )
    assert refused(lambda: first.GetEvaluation(asked)) is grpc.StatusCode.NOT_FOUND
    unknown = pb.GetEvaluationRequest(knowledge_base="measured", evaluation="../../x")
    assert refused(lambda: second.GetEvaluation(unknown)) is grpc.StatusCode.NOT_FOUND
