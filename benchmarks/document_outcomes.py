"""What becomes of each file of the data folder's documents: its text, or why there is none.

    python -m benchmarks.document_outcomes

Uploaded one after the other through gRPC, each timed until it is ready or failed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
from forebay.v1 import knowledge_pb2 as pb
from forebay.v1 import knowledge_pb2_grpc

from benchmarks.common import RESULTS, machine
from benchmarks.retrieval_server import running

BASE = "documents"
#: Characters of a text that are shown.
SHOWN = 48


def outcome(
    stub: knowledge_pb2_grpc.KnowledgeServiceStub, file: Path
) -> tuple[pb.Document, str, float]:
    """(the document as it ended, how its text begins, seconds)."""

    def messages() -> Iterator[pb.UploadDocumentRequest]:
        yield pb.UploadDocumentRequest(header={"knowledge_base": BASE})
        data = file.read_bytes()
        for start in range(0, max(1, len(data)), 1 << 20):
            piece = {"path": file.name, "data": data[start : start + (1 << 20)]}
            yield pb.UploadDocumentRequest(chunk=piece)

    began = time.monotonic()
    (sent,) = stub.UploadDocument(messages()).documents
    ask = pb.GetDocumentRequest(knowledge_base=BASE, document=sent.document.id, with_text=True)
    while True:
        found = stub.GetDocument(ask)
        ended = (pb.DOCUMENT_STATUS_READY, pb.DOCUMENT_STATUS_FAILED)
        if found.document.status in ended:
            break
        time.sleep(0.02)
    took = time.monotonic() - began
    return found.document, " ".join("".join(p.text for p in found.pages[:3]).split())[:SHOWN], took


def main() -> None:
    """Upload all, write the table."""
    lines = [
        "# What becomes of each document",
        "",
        "`python -m benchmarks.document_outcomes`. Seconds are from the first byte of the upload until "
        "the document can be found (parsed, cut, embedded, stored) or has failed.",
        "",
        "| file | media type | pages | characters | chunks | seconds | text begins, or why there is none |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as home, running(Path(home)) as (channel, data):
        stub = knowledge_pb2_grpc.KnowledgeServiceStub(channel)
        stub.CreateKnowledgeBase(pb.CreateKnowledgeBaseRequest(knowledge_base=BASE))
        folder = data / "documents"
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            try:
                d, text, took = outcome(stub, file)
            except grpc.RpcError as e:
                said = f"refused: {e.code().name}: {e.details()}"
                lines.append(f"| {file.relative_to(folder)} | | | | | | {said} |")
                continue
            shown = text if d.status == pb.DOCUMENT_STATUS_READY else f"**{d.reason}**: {d.message}"
            shown = shown.replace("|", "\\|")
            lines.append(
                f"| {file.relative_to(folder)} | {d.media_type} | {d.pages or ''} "
                f"| {d.characters:,} | {d.chunks} | {took:.2f} | {shown} |"
            )
            print(lines[-1], flush=True)
    facts = machine()
    lines += ["", f"{facts['cpu']}, {facts['cores']} cores, {facts['date']}."]
    (RESULTS / "document_outcomes.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
