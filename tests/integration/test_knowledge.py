"""KnowledgeService through gRPC and REST: real files, the real embedding model."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from forebay.v1 import collection_pb2, collection_pb2_grpc, knowledge_pb2_grpc
from forebay.v1 import knowledge_pb2 as pb
from forebay_server.knowledge.bases import BaseConfig
from forebay_server.knowledge.ingest import internal_call
from forebay_server.storage.database import Database
from forebay_server.storage.knowledge import BaseRow, KnowledgeStore
from google.protobuf import json_format

from tests.conftest import Live, Start, copy_models
from tests.integration.gateway import Gateway
from tests.integration.test_inference import violations


@pytest.fixture(scope="module")
def models(starters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_models(starters, tmp_path_factory.mktemp("models") / "models", "minilm")


@pytest.fixture(scope="module")
def live(models: Path, start: Start) -> Live:
    return start(models)


@pytest.fixture(scope="module")
def stub(live: Live) -> knowledge_pb2_grpc.KnowledgeServiceStub:
    return knowledge_pb2_grpc.KnowledgeServiceStub(live.channel)


def create(stub, name: str, **config) -> None:
    request = pb.CreateKnowledgeBaseRequest(knowledge_base=name)
    json_format.ParseDict(config, request.config)
    stub.CreateKnowledgeBase(request)


def upload(stub, base: str, *files: Path | tuple[str, bytes], password: str = "", **metadata):
    def messages() -> Iterator[pb.UploadDocumentRequest]:
        first = pb.UploadDocumentRequest(header={"knowledge_base": base, "password": password})
        first.header.metadata.update(metadata)
        yield first
        for file in files:
            name, data = file if isinstance(file, tuple) else (file.name, file.read_bytes())
            for start in range(0, max(1, len(data)), 100_000):
                piece = {"path": name, "data": data[start : start + 100_000]}
                yield pb.UploadDocumentRequest(chunk=piece)

    return list(stub.UploadDocument(messages()).documents)


def wait(stub, base: str, seconds: float = 60) -> dict[str, pb.Document]:
    """Documents by name, when none is being worked on."""
    deadline = time.monotonic() + seconds
    while True:
        page = stub.ListDocuments(pb.ListDocumentsRequest(knowledge_base=base, page_size=1000))
        assert not page.next_page_token
        documents = page.documents
        busy = [d for d in documents if d.status in (1, 2, 3)]
        if not busy:
            return {d.name: d for d in documents}
        assert time.monotonic() < deadline, busy
        time.sleep(0.05)


HANDBOOK = b"""# Handbook

## Holidays

Every employee has thirty days of paid holiday a year. Holidays that are not taken expire in March.

## Travel

Train tickets are booked by the office. Flights need the approval of a director.
A hotel may cost at most 140 euros a night.
"""


@pytest.fixture(scope="module")
def office(stub) -> str:
    create(stub, "office", language="en", chunks={"method": "CHUNK_METHOD_HEADING"})
    upload(stub, "office", ("handbook.md", HANDBOOK), author="HR", year=2026)
    upload(stub, "office", ("cats.txt", b"Cats sleep for most of the day."), author="vet")
    assert {d.status for d in wait(stub, "office").values()} == {pb.DOCUMENT_STATUS_READY}
    return "office"


def test_retrieve_gives_chunks_with_their_places(stub, office: str) -> None:
    found = stub.Retrieve(
        pb.RetrieveRequest(knowledge_base=office, query="price limit for hotels", explain=True)
    )
    best = found.chunks[0]
    assert list(best.headings) == ["Handbook", "Travel"]
    assert best.metadata["author"] == "HR"
    text = HANDBOOK.decode()
    assert text[best.start : best.end] == best.text
    assert [s.name for s in found.steps] == ["search"]
    assert found.served_by.model == "minilm"
    only = pb.RetrieveRequest(knowledge_base=office, query="hotels")
    json_format.ParseDict(
        {"filter": {"equals": {"key": "metadata.author", "value": "vet"}}}, only.retrieval
    )
    assert [c.name for c in stub.Retrieve(only).chunks] == ["cats.txt"]


def test_filters_choose_by_name_and_metadata(stub, office: str) -> None:
    for key, value in (("name", "cats.txt"), ("metadata.author", "vet")):
        one = {"equals": {"key": key, "value": value}}
        request = pb.RetrieveRequest(knowledge_base=office, query="price limit for hotels")
        json_format.ParseDict(one, request.retrieval.filter)
        assert {c.name for c in stub.Retrieve(request).chunks} == {"cats.txt"}


def test_a_filter_of_no_text_field_is_blamed_where_it_stands(stub, office: str) -> None:
    retrieval = {"filter": {"none_of": {"filters": [{"text": {"key": "z", "text": "a"}}]}}}
    for ask, request in [
        (stub.Retrieve, pb.RetrieveRequest(query="cats", retrieval=retrieval)),
        (stub.Ask, pb.AskRequest(question="cats?", retrieval=retrieval)),
    ]:
        request.knowledge_base = office
        with pytest.raises(grpc.RpcError) as caught:
            ask(request)
        assert set(violations(caught.value)) == {"retrieval.filter.none_of.filters[0].text.key"}


def test_rerank_and_mmr_are_steps(stub, office: str) -> None:
    request = pb.RetrieveRequest(knowledge_base=office, query="days off", explain=True)
    json_format.ParseDict({"rerank": {"model": "minilm"}, "mmr": {}}, request.retrieval)
    found = stub.Retrieve(request)
    assert [s.name for s in found.steps] == ["search", "rerank", "mmr"]
    assert "Holidays" in found.chunks[0].headings


def test_ask_answers_with_verified_citations(stub, office: str) -> None:
    question = "How many days of paid holiday does an employee have?"
    answer = stub.Ask(pb.AskRequest(knowledge_base=office, question=question))
    assert answer.method == pb.ANSWER_METHOD_EXTRACTED
    assert answer.answer.startswith("Every employee has thirty days of paid holiday a year. [1]")
    citation = answer.citations[0]
    assert citation.verified and citation.name == "handbook.md"
    document = stub.GetDocument(
        pb.GetDocumentRequest(knowledge_base=office, document=citation.document, with_text=True)
    )
    text = "".join(p.text for p in document.pages)
    assert text[citation.start : citation.end] == citation.quote
    assert "thirty" in text[citation.answer_start : citation.answer_end]
    assert citation.start <= citation.answer_start < citation.answer_end <= citation.end


def test_ask_says_when_the_documents_do_not_hold_the_answer(stub, office: str) -> None:
    question = "What is the boiling point of tungsten?"
    answer = stub.Ask(pb.AskRequest(knowledge_base=office, question=question))
    assert answer.method == pb.ANSWER_METHOD_NOT_FOUND
    assert not answer.citations


def test_a_follow_up_is_understood_by_the_question_before(stub, office: str) -> None:
    history = [pb.Turn(role=pb.TURN_ROLE_USER, text="What may a hotel cost?")]
    request = pb.AskRequest(knowledge_base=office, question="And who approves flights?")
    request.history.extend(history)
    assert "director" in stub.Ask(request).answer


def test_ask_stream_sends_events_in_order(stub, office: str) -> None:
    request = pb.AskStreamRequest(knowledge_base=office, question="What may a hotel cost?")
    events = list(stub.AskStream(request))
    kinds = [e.WhichOneof("event") for e in events]
    assert kinds[:4] == ["stage", "sources", "stage", "token"]
    assert kinds[-2:] == ["usage", "done"]
    assert "140 euros" in "".join(e.token.text for e in events)
    assert all(e.citation.verified for e in events if e.WhichOneof("event") == "citation")


def test_upload_again_is_a_duplicate_and_delete_leaves_no_trace(stub, live: Live) -> None:
    create(stub, "traces")
    first = upload(stub, "traces", ("a.txt", b"The secret word is xylophone."))[0]
    assert upload(stub, "traces", ("b.txt", b"The secret word is xylophone."))[0].duplicate
    wait(stub, "traces")
    name = first.document.id
    stub.DeleteDocument(pb.DeleteDocumentRequest(knowledge_base="traces", document=name))
    found = stub.Retrieve(pb.RetrieveRequest(knowledge_base="traces", query="xylophone"))
    assert not found.chunks
    home = live.settings.home
    assert not [p for p in (home / "knowledge").rglob("*") if name in p.name]
    again = upload(stub, "traces", ("c.txt", b"The secret word is xylophone."))[0]
    assert not again.duplicate
    wait(stub, "traces")
    stub.DeleteKnowledgeBase(pb.DeleteKnowledgeBaseRequest(knowledge_base="traces"))
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetKnowledgeBase(pb.GetKnowledgeBaseRequest(knowledge_base="traces"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


class Paused(KnowledgeStore):
    """What was committed is said to be so a while later."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.committed = asyncio.Event()

    async def create_base(self, name: str, config: str) -> BaseRow:
        row = await super().create_base(name, config)
        self.committed.set()
        await asyncio.sleep(0.05)
        return row


def test_a_base_whose_caller_leaves_at_the_commit_is_there(stub, live: Live) -> None:
    retrieval = live.server._retrieval
    assert retrieval is not None
    bases = retrieval.bases

    async def cut_off() -> None:
        usual = bases.store
        bases.store = paused = Paused(usual._database)
        try:
            made = asyncio.create_task(bases.create(internal_call(), "cut", BaseConfig("minilm")))
            await asyncio.wait_for(paused.committed.wait(), 10)
            made.cancel()
            with pytest.raises(asyncio.CancelledError):
                await made
            await asyncio.sleep(0.5)
        finally:
            bases.store = usual

    live.run(cut_off())
    found = stub.GetKnowledgeBase(pb.GetKnowledgeBaseRequest(knowledge_base="cut"))
    assert found.knowledge_base.name == "cut"


def test_ingest_again_replaces_every_chunk(stub) -> None:
    create(stub, "again", chunks={"tokens": 20, "overlap": 0})
    text = " ".join(f"Sentence number {i} speaks of item {i}." for i in range(40))
    document = upload(stub, "again", ("a.txt", text.encode()))[0].document
    before = wait(stub, "again")["a.txt"]
    assert before.chunks > 5
    stub.ReingestDocument(pb.ReingestDocumentRequest(knowledge_base="again", document=document.id))
    after = wait(stub, "again")["a.txt"]
    base = stub.GetKnowledgeBase(pb.GetKnowledgeBaseRequest(knowledge_base="again"))
    assert base.knowledge_base.chunks == after.chunks == before.chunks


def test_unfinished_documents_go_on_after_a_restart(
    models: Path, start: Start, tmp_path: Path
) -> None:
    live = start(models, home=tmp_path)
    stub = knowledge_pb2_grpc.KnowledgeServiceStub(live.channel)
    create(stub, "later")
    files = [
        (f"{i}.txt", f"Note {i}: the code of door {i} is {i * 37}.".encode()) for i in range(8)
    ]
    upload(stub, "later", *files)
    live.stop()
    live = start(models, home=tmp_path)
    stub = knowledge_pb2_grpc.KnowledgeServiceStub(live.channel)
    assert {d.status for d in wait(stub, "later").values()} == {pb.DOCUMENT_STATUS_READY}
    answer = stub.Ask(pb.AskRequest(knowledge_base="later", question="code of door 5"))
    assert "185" in answer.answer
    live.stop()


def test_a_ready_server_knows_its_stored_bases(models: Path, start: Start, tmp_path: Path) -> None:
    live = start(models, home=tmp_path)
    stub = knowledge_pb2_grpc.KnowledgeServiceStub(live.channel)
    names = [f"stored-{i}" for i in range(8)]
    for name in names:
        create(stub, name)
        upload(stub, name, ("handbook.md", HANDBOOK))
        wait(stub, name)
    port = live.server.port
    live.stop()
    # Asked from another process: a thread of this one would wait for the server's own work.
    asking = subprocess.Popen(
        [sys.executable, "-c", FIRST_CALLS, str(port), *names], stdout=subprocess.PIPE, text=True
    )
    try:
        live = start(models, home=tmp_path, grpc__port=port)
        assert asking.communicate(timeout=60)[0].split() == ["1"] * len(names)
        live.stop()
    finally:
        asking.kill()


#: Prints how many chunks each base has, asked as soon as the server says that it is ready.
FIRST_CALLS = """
import sys
import grpc
from forebay.oip import open_inference_pb2 as oip, open_inference_pb2_grpc as oip_grpc
from forebay.v1 import knowledge_pb2, knowledge_pb2_grpc

port, *names = sys.argv[1:]
while True:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            ask = oip_grpc.GRPCInferenceServiceStub(channel).ServerReady
            while not ask(oip.ServerReadyRequest(), timeout=5).ready:
                pass
        except grpc.RpcError:
            continue
        bases = knowledge_pb2_grpc.KnowledgeServiceStub(channel)
        for name in reversed(names):
            ask = knowledge_pb2.GetKnowledgeBaseRequest(knowledge_base=name)
            print(bases.GetKnowledgeBase(ask).knowledge_base.chunks)
        break
"""


def test_formats(stub, tmp_path: Path) -> None:
    import docx

    made = docx.Document()
    made.add_heading("Opening hours", 1)
    made.add_paragraph("The library opens at nine.")
    made.save(str(tmp_path / "a.docx"))
    with zipfile.ZipFile(tmp_path / "bomb.docx", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("word/document.xml", b"\0" * (300 << 20))
    create(stub, "formats", chunks={"method": "CHUNK_METHOD_HEADING"})
    html = b"<html><style>p{}</style><h2>Fees</h2><p>The fee is <b>five</b> euros.</p></html>"
    upload(
        stub,
        "formats",
        tmp_path / "a.docx",
        tmp_path / "bomb.docx",
        ("b.html", html),
        ("c.csv", b"city,people\nBonn,330000\nKiel,247000\n"),
        ("d.json", json.dumps({"server": {"port": 8080}}).encode()),
        ("e.json", b"{broken"),
        ("f.bin", b"\x00\x01\x02"),
        ("g.txt", b""),
        ("h.md", b"[" * 100_000),
    )
    found = wait(stub, "formats", 100)
    reasons = {n: d.reason for n, d in found.items() if d.reason}
    assert reasons == {
        "bomb.docx": "TOO_LARGE",
        "e.json": "BROKEN",
        "f.bin": "UNSUPPORTED",
        "g.txt": "EMPTY",
        "h.md": "NO_TEXT",
    }

    def best(query: str) -> pb.Chunk:
        return stub.Retrieve(pb.RetrieveRequest(knowledge_base="formats", query=query)).chunks[0]

    assert best("when does the library open").headings == ["Opening hours"]
    assert best("euros").text == "Fees\nThe fee is five euros."
    assert "people: 330000" in best("people of Bonn").text
    assert best("server port").text == "server.port: 8080"


def test_evaluate_compares_configurations(stub, office: str) -> None:
    request = pb.EvaluateRequest(knowledge_base=office)
    for query, text in (("paid holiday days", "thirty days"), ("hotel price", "140 euros")):
        request.items.add(query=query, relevant_texts=[text])
    request.items.add(query="what do cats do", relevant_documents=["cats.txt"])
    for name, mode in (("words", 2), ("meaning", 1)):
        request.runs.add(name=name).retrieval.mode = mode
    results = {r.name: {m.name: m for m in r.metrics} for r in stub.Evaluate(request).results}
    meaning = results["meaning"]["recall@5"]
    assert (meaning.value, meaning.n, meaning.failures) == (1.0, 3, 0)
    assert results["words"]["mrr@10"].low <= results["words"]["mrr@10"].value


def test_chunks_stay_out_of_the_list_of_collections(stub, live: Live, office: str) -> None:
    collections = collection_pb2_grpc.CollectionServiceStub(live.channel)
    found = collections.ListCollections(collection_pb2.ListCollectionsRequest()).collections
    assert not found
    point = collection_pb2.Point(id="a", payload={"text": "no chunk"})
    written = collection_pb2.UpsertPointsRequest(collection=".knowledge-1", points=[point])
    header = collection_pb2.UpsertStreamRequest(header={"collection": ".knowledge-1"})
    removed = collection_pb2.DeletePointsRequest(collection=".knowledge-1", ids=["a"])
    for refused in (
        lambda: collections.UpsertPoints(written),
        lambda: collections.UpsertStream(iter([header])),
        lambda: collections.DeletePoints(removed),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            refused()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_rest_uploads_a_form_and_streams_the_answer(gateway: Gateway, stub) -> None:
    http = gateway.http
    made = http.post("/api/v1/knowledge", json={"knowledge_base": "rest"})
    assert made.status_code == 200, made.text
    sent = http.post(
        "/api/v1/knowledge:upload",
        data={"knowledge_base": "rest", "metadata": json.dumps({"year": 2026})},
        files=[("file", ("note.txt", b"The meeting room is on the fourth floor."))],
    )
    assert sent.status_code == 200, sent.text
    document = sent.json()["documents"][0]["document"]
    assert document["metadata"] == {"year": 2026}
    assert wait(stub, "rest")["note.txt"].status == pb.DOCUMENT_STATUS_READY
    path = f"/api/v1/knowledge/rest/documents/{document['id']}"
    assert http.get(path, params={"with_text": "true"}).json()["pages"][0]["text"].startswith("The")
    question = {"question": "Where is the meeting room?"}
    answer = http.post("/api/v1/knowledge/rest:ask", json=question).json()
    assert "fourth floor" in answer["answer"] and answer["citations"][0]["verified"]
    with http.stream("POST", "/api/v1/knowledge/rest:askStream", json=question) as stream:
        lines = [json.loads(x[6:]) for x in stream.iter_lines() if x.startswith("data: ")]
    assert "token" in lines[3] and "done" in lines[-1]
    wrong = http.post("/api/v1/knowledge/rest:ask", json={"question": ""})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "question"
    assert http.delete(path).json()["chunks"] == 1
