"""A tiny language model for tests: trained in minutes on a CPU, and good for nothing else.

It exists so that streaming, stop strings, logprobs, structured output, tool calls and answers from
a context can be tested with a real engine on a machine without internet. It knows its templates
and some old English prose; do not ask it anything else.
"""
