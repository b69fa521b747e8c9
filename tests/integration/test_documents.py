"""Every real document: its text or a clear reason, through KnowledgeService."""

from __future__ import annotations

from pathlib import Path

import pytest
from forebay.v1 import knowledge_pb2 as pb
from forebay.v1 import knowledge_pb2_grpc

from tests.conftest import LANES, Live, Start
from tests.integration.test_faults import deterministic
from tests.integration.test_knowledge import create, upload, wait


@pytest.fixture(scope="module")
def lane() -> str:
    """One: parsers know nothing of lanes."""
    return LANES[0]


@pytest.fixture(scope="module")
def live(starters: Path, start: Start, tmp_path_factory: pytest.TempPathFactory) -> Live:
    # Its engine gives each text numbers of its own at no cost: what a model makes of it, others test.
    root = tmp_path_factory.mktemp("models")
    models = deterministic(root, starters, "numbers", "default_for: [embedding]\n")
    return start(models)


@pytest.fixture(scope="module")
def stub(live: Live) -> knowledge_pb2_grpc.KnowledgeServiceStub:
    return knowledge_pb2_grpc.KnowledgeServiceStub(live.channel)


EXPECTED = {
    "bad_encryption_length.pdf": "ENCRYPTED",
    "five_bytes.pdf": "BROKEN",
    "poppler_395_fuzzed.pdf": "BROKEN",
    "empty_pages.pdf": "NO_TEXT",
    "scan_image_only.pdf": "NO_TEXT",
    "password_required.pdf": "ENCRYPTED",
    "aes256_r6_both_passwords.pdf": "ENCRYPTED",
    "state_union.zip": "UNSUPPORTED",
}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_document_is_read_or_says_why_not(stub, data: Path) -> None:
    create(stub, "documents")
    files = [p for p in (data / "documents").rglob("*") if p.suffix in (".pdf", ".txt", ".zip")]
    for file in files:
        upload(stub, "documents", file)
    found = wait(stub, "documents", 300)
    failed = {n: d.reason for n, d in found.items() if d.status == pb.DOCUMENT_STATUS_FAILED}
    assert failed == EXPECTED
    assert all(found[n].message for n in failed)
    assert found["geotopo_de_117p.pdf"].pages == 117

    def text(name: str) -> str:
        request = pb.GetDocumentRequest(
            knowledge_base="documents", document=found[name].id, with_text=True
        )
        return "".join(p.text for p in stub.GetDocument(request).pages)

    assert "Einführung in die" in text("geotopo_de_117p.pdf")
    assert "حَبيبي" in text("arabic_habibi.pdf")
    assert "みんなのおのおの" in text("japanese_jo.pdf")
    assert "世界人权宣言" in text("udhr_cmn_hans.txt")
    assert "الإعلان العالمي" in text("udhr_arb.txt")
    secret = stub.ReingestDocument(
        pb.ReingestDocumentRequest(
            knowledge_base="documents",
            document=found["aes256_r6_both_passwords.pdf"].id,
            password="foo",
        )
    ).document
    assert wait(stub, "documents")[secret.name].status == pb.DOCUMENT_STATUS_READY
    question = "Wer hat das Recht auf Bildung?"
    answer = stub.Ask(pb.AskRequest(knowledge_base="documents", question=question))
    assert answer.citations and all(c.verified for c in answer.citations)
