"""A knowledge base as a LlamaIndex retriever. `pip install llama-index-core httpx`

python llamaindex_retriever.py http://localhost:8080 handbook "What may a hotel cost?"
"""

import sys

import httpx
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode


class ForebayRetriever(BaseRetriever):
    """Chunks of a knowledge base, best first."""

    def __init__(self, url: str, knowledge_base: str, top_k: int = 4) -> None:
        super().__init__()
        self._path = f"{url}/api/v1/knowledge/{knowledge_base}:retrieve"
        self._top_k = top_k

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        body = {"query": query_bundle.query_str, "retrieval": {"top_k": self._top_k}}
        answer = httpx.post(self._path, json=body, timeout=60).raise_for_status().json()
        return [
            NodeWithScore(
                node=TextNode(
                    text=c["text"],
                    id_=c["id"],
                    metadata={"name": c["name"], "page": c["page"], **c.get("metadata", {})},
                ),
                score=c["score"],
            )
            for c in answer["chunks"]
        ]


if __name__ == "__main__":
    url, base, question = sys.argv[1:]
    for found in ForebayRetriever(url, base).retrieve(question):
        print(found.node.metadata["name"], found.node.get_content()[:80])
