"""OpenAI-compatible routes, and Cohere's and Jina's rerank: projections of the contract's methods."""
