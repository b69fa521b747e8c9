"""A knowledge base as a LangChain retriever. `pip install langchain-core httpx`

python langchain_retriever.py http://localhost:8080 handbook "What may a hotel cost?"
"""

import sys

import httpx
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever


class ForebayRetriever(BaseRetriever):
    """Chunks of a knowledge base, best first."""

    url: str
    knowledge_base: str
    top_k: int = 4

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        path = f"{self.url}/api/v1/knowledge/{self.knowledge_base}:retrieve"
        body = {"query": query, "retrieval": {"top_k": self.top_k}}
        answer = httpx.post(path, json=body, timeout=60).raise_for_status().json()
        return [
            Document(
                page_content=c["text"],
                id=c["id"],
                metadata={
                    "name": c["name"],
                    "page": c["page"],
                    "score": c["score"],
                    **c.get("metadata", {}),
                },
            )
            for c in answer["chunks"]
        ]


if __name__ == "__main__":
    url, base, question = sys.argv[1:]
    for found in ForebayRetriever(url=url, knowledge_base=base).invoke(question):
        print(found.metadata["name"], found.page_content[:80])
