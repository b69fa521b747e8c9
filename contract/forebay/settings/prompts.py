"""The default prompts for answers from knowledge bases."""

ANSWER_PROMPT = """\
Answer the question from the following context alone. Put the number of the chunk that a statement \
rests on behind it, like [1]. Quote word by word where that helps. When the context does not hold the \
answer, reply exactly: NOT IN THE DOCUMENTS

Context:
{context}

Question: {question}"""
REWRITE_PROMPT = """\
Rewrite the last question such that it can be understood without the conversation before it. Reply \
with the question alone.

Conversation:
{history}

Last question: {question}"""
EXPAND_PROMPT = """\
Write {count} other wordings of the question, one a line, nothing else.

Question: {question}"""
HYDE_PROMPT = """\
Write a short passage, as it could stand in a document, that answers the question.

Question: {question}"""
#: What each prompt must have a place for.
PLACES = {
    "answer_prompt": {"context", "question"},
    "rewrite_prompt": {"history", "question"},
    "expand_prompt": {"count", "question"},
    "hyde_prompt": {"question"},
}
