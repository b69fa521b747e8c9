"""Ingest against the bare embedding loop, and the first token of extracted answers, in one run.

    python -m benchmarks.knowledge_speed --home DIR --fill     # once, about eight minutes
    python -m benchmarks.knowledge_speed --home DIR

Abstracts of SciFact. Timed ingest: files of 20 abstracts, then of one, with about `--timed` chunks a
round; from the first upload until the last document is ready. The bare loop embeds the very same
chunks in this process: tokenizer and ONNX Runtime with as many threads, in batches of one size; the
best of several sizes counts. It runs right before each ingest. Then the filled base is asked by one
caller, one question at a time.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import grpc
import numpy as np
from forebay.v1 import knowledge_pb2 as pb
from forebay.v1 import knowledge_pb2_grpc

from benchmarks.common import KEPT, RESULTS, machine
from benchmarks.retrieval_server import data_folder, running

Stub = knowledge_pb2_grpc.KnowledgeServiceStub
#: Batch sizes that the bare loop tries.
SIZES = (2, 4, 8)
#: Abstracts of a file, and how results call it.
KINDS = {20: "20 abstracts a file", 1: "1 abstract a file"}
#: Models that embed, and in which precision. The bare loop runs in fp32.
MODELS = {"minilm-onnxruntime": "fp32", "": "default profile"}
BASE = "scifact"


def upload(stub: Stub, base: str, files: Sequence[tuple[str, str]]) -> None:
    """Files by one stream."""

    def messages():
        yield pb.UploadDocumentRequest(header={"knowledge_base": base})
        for name, text in files:
            yield pb.UploadDocumentRequest(chunk={"path": name, "data": text.encode()})

    stub.UploadDocument(messages())


def wait(stub: Stub, base: str) -> None:
    """Until no document is being worked on. Seldom asked: server and load share the cores."""
    for status in (1, 2, 3):
        asked = pb.ListDocumentsRequest(knowledge_base=base, status=status, page_size=1)
        while stub.ListDocuments(asked).documents:
            time.sleep(0.1)


def chunks_in(stub: Stub, base: str) -> int:
    """Chunks that can be found."""
    asked = pb.GetKnowledgeBaseRequest(knowledge_base=base)
    return stub.GetKnowledgeBase(asked).knowledge_base.chunks


def ingest(
    stub: Stub, base: str, files: Sequence[tuple[str, str]], model: str = ""
) -> dict[str, float]:
    """Chunks a second of a new knowledge base. `model`: empty = the default one."""
    config = {"language": "en", "embedding_model": model}
    stub.CreateKnowledgeBase(pb.CreateKnowledgeBaseRequest(knowledge_base=base, config=config))
    began = time.monotonic()
    upload(stub, base, files)
    wait(stub, base)
    took = time.monotonic() - began
    count = chunks_in(stub, base)
    return {"files": len(files), "chunks": count, "seconds": took, "chunks_per_s": count / took}


def cut(texts: Sequence[str]) -> list[str]:
    """The chunks that the server makes of these texts, by its own code."""
    from forebay_server.knowledge.chunking import ChunkConfig, chunk
    from forebay_server.knowledge.parsers import Parsed
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(KEPT / "models" / "minilm" / "1" / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def spans(text: str) -> list[tuple[int, int]]:
        return tokenizer.encode(text, add_special_tokens=False).offsets

    out: list[str] = []
    for text in texts:
        for c in chunk(Parsed("text/plain", text), ChunkConfig(), spans, 254):
            out.append(text[c.start : c.end])
    return out


def bare(chunks: Sequence[str], threads: int) -> dict[str, float]:
    """Chunks a second of tokenizer and ONNX Runtime alone, at the best batch size."""
    import onnxruntime as ort
    from tokenizers import Tokenizer

    folder = KEPT / "models" / "minilm" / "1"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    tokenizer.enable_padding()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(folder / "model.onnx"), options)

    def run(size: int, texts: Sequence[str]) -> float:
        began = time.monotonic()
        for i in range(0, len(texts), size):
            encoded = tokenizer.encode_batch(list(texts[i : i + size]))
            ids = np.array([e.ids for e in encoded], np.int64)
            mask = np.array([e.attention_mask for e in encoded], np.int64)
            feeds = {"input_ids": ids, "attention_mask": mask}
            session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})
        return len(texts) / (time.monotonic() - began)

    run(8, chunks[:32])
    tried = {size: run(size, chunks[: max(64, len(chunks) // 5)]) for size in SIZES}
    best = max(tried, key=lambda s: tried[s])
    return {"batch_size": best, "chunks_per_s": run(best, chunks)}


def first_tokens(stub: Stub, base: str, questions: Sequence[str]) -> dict[str, float]:
    """Milliseconds from the call to the first piece of the answer, and to the end."""
    first, whole = [], []
    for question in questions:
        began = time.monotonic()
        seen = 0.0
        for event in stub.AskStream(pb.AskStreamRequest(knowledge_base=base, question=question)):
            if not seen and event.WhichOneof("event") == "token":
                seen = time.monotonic() - began
        first.append(seen * 1e3)
        whole.append((time.monotonic() - began) * 1e3)
    out: dict[str, float] = {"questions": len(questions)}
    for name, values in (("first_token", first), ("whole", whole)):
        for p in (50, 90, 99):
            out[f"{name}_p{p}_ms"] = float(np.percentile(values, p))
    return out


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--chunks", type=int, default=10_000)
    parser.add_argument("--timed", type=int, default=150, help="chunks of one timed ingest")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument(
        "--home", type=Path, help="keep the filled base there, or take it from there"
    )
    parser.add_argument("--fill", action="store_true", help="fill the base alone, measure nothing")
    parser.add_argument("--dry", action="store_true", help="print alone, keep no results")
    args = parser.parse_args()
    folder = data_folder() / "retrieval" / "scifact"
    with gzip.open(folder / "corpus.jsonl.gz", "rt") as file:
        texts = [f"{d['title']}\n\n{d['text']}\n\n" for d in map(json.loads, file)]
    with (folder / "queries.jsonl").open() as file:
        queries = [json.loads(line)["text"] for line in file][: args.questions]
    from forebay_server.core.interfaces import EngineSpec
    from forebay_server.engines.openvino import lacking

    starter = EngineSpec("minilm", 1, "openvino", "", "tokens", options={"precision": "int8"})
    out: dict = {"machine": machine(), "default": "fp32" if lacking(starter) else "int8"}
    with (
        tempfile.TemporaryDirectory() as folder_,
        running(args.home or Path(folder_), "minilm minilm:onnxruntime") as (channel, _),
    ):
        stub = Stub(channel)
        fill(stub, texts, args.chunks)
        if args.fill:
            return
        warm(stub)
        taken, bases = 0, [f"warm-{model}" for model in MODELS]
        for (each, kind), (model, precision) in itertools.product(KINDS.items(), MODELS.items()):
            name = f"{kind}, {precision}"
            out[name] = found = []
            for number in range(args.rounds):
                count = max(1, int(args.timed / 1.7 / each))
                files = []
                for i in range(count):
                    files.append((f"{each}-{i}.txt", "".join(texts[taken : taken + each])))
                    taken += each
                bases.append(f"{each}-{number}-{model or 'default'}")
                found.append(ratio(stub, bases[-1], files, model))
                print(name, found[-1], flush=True)
        chunks = chunks_in(stub, BASE)
        out["asked"] = {"chunks": chunks, **first_tokens(stub, BASE, queries)}
        print(out["asked"], flush=True)
        for name in bases:
            stub.DeleteKnowledgeBase(pb.DeleteKnowledgeBaseRequest(knowledge_base=name))
    if args.dry:
        return
    (RESULTS / "knowledge_speed.json").write_text(json.dumps(out, indent=1) + "\n")
    (RESULTS / "knowledge_speed.md").write_text(page(out))


def ratio(stub: Stub, base: str, files: Sequence[tuple[str, str]], model: str) -> dict[str, float]:
    """One round: the bare loop, then ingest, over the same files."""
    found = cut([text for _, text in files])
    loop = bare(found, os.cpu_count() or 1)
    mine = ingest(stub, base, files, model)
    assert len(found) == mine["chunks"], (len(found), mine)
    return {
        **mine,
        "bare_chunks_per_s": loop["chunks_per_s"],
        "bare_batch_size": loop["batch_size"],
        "ratio": mine["chunks_per_s"] / loop["chunks_per_s"],
    }


def fill(stub: Stub, texts: Sequence[str], chunks: int) -> None:
    """The base that is asked: its first `chunks` chunks, as far as they are missing."""
    config = {"language": "en"}
    try:
        stub.CreateKnowledgeBase(pb.CreateKnowledgeBaseRequest(knowledge_base=BASE, config=config))
    except grpc.RpcError as e:
        if e.code() is not grpc.StatusCode.ALREADY_EXISTS:
            raise
    # SciFact has 9,362 chunks; the last ones are abstracts once more, in other files.
    for size in (100, 30):
        for at in range(0, len(texts), size):
            if chunks_in(stub, BASE) >= chunks:
                return
            upload(stub, BASE, [(f"f{size}-{at}.txt", "".join(texts[at : at + size]))])
            if at % (10 * size) == 9 * size:
                wait(stub, BASE)
        wait(stub, BASE)


def warm(stub: Stub) -> None:
    """One document by each model, so that it is loaded and every module imported."""
    for model in MODELS:
        ingest(stub, f"warm-{model}", [("warm.txt", "Warm words.")], model)
    list(stub.AskStream(pb.AskStreamRequest(knowledge_base="warm-", question="Which words?")))


def page(out: dict) -> str:
    """The results as a page."""
    m, asked = out["machine"], out["asked"]
    lines = [
        "# Knowledge bases: ingest and first token",
        "",
        f"{m['cpu']}, {m['cores']} cores; minilm; abstracts of SciFact; {m['date']}. "
        "`python -m benchmarks.knowledge_speed`.",
        "",
        "| files | chunks | ingest, chunks/s | bare loop, chunks/s | ratio |",
        "|---|---|---|---|---|",
    ]
    for kind, precision in itertools.product(KINDS.values(), MODELS.values()):
        rounds = out[f"{kind}, {precision}"]
        ratios = sorted(r["ratio"] for r in rounds)
        speeds = ", ".join(f"{r['chunks_per_s']:.1f}" for r in rounds)
        loops = ", ".join(f"{r['bare_chunks_per_s']:.1f}" for r in rounds)
        each = ", ".join(f"{r['ratio']:.2f}" for r in rounds)
        lines.append(
            f"| {rounds[0]['files']} of {kind}, {precision} | {rounds[0]['chunks']} | {speeds} | {loops} | {each}; "
            f"median {ratios[len(ratios) // 2]:.2f} |"
        )
    lines += [
        "",
        "Ingest is from the first byte of the upload until the last document is ready: stored, parsed "
        "in a process of its own, cut, embedded, written and indexed. The bare loop is tokenizer and "
        "ONNX Runtime alone over the same chunks, in fp32: the ratio of layers is that of fp32. The "
        f"default profile is int8 where the processor has VNNI; here it was {out['default']}.",
        "",
        f"Answers by extraction, one caller, {asked['chunks']} chunks, {asked['questions']} questions:",
        "",
        "| | p50 | p90 | p99 |",
        "|---|---|---|---|",
    ]
    for name, title in (("first_token", "first token, ms"), ("whole", "whole answer, ms")):
        values = " | ".join(f"{asked[f'{name}_p{p}_ms']:.0f}" for p in (50, 90, 99))
        lines.append(f"| {title} | {values} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
