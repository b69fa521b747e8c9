"""vLLM's own `LLM.generate`, run in vLLM's environment: the bar for benchmarks/generation.py."""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    """Arguments as one JSON object; a round for each line of input, `STREAMS ROUND`."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    a = json.loads(sys.argv[1])
    with open(a["prompts"]) as file:
        given = json.load(file)
    llm = LLM(a["model"], max_model_len=a["context"], max_num_seqs=64, **a["options"])
    params = SamplingParams(temperature=0, max_tokens=a["tokens"], ignore_eos=True)
    for line in sys.stdin:
        streams, number = line.split()
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in given[streams][int(number)]]
        started = time.perf_counter()
        done = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        rate = sum(len(d.outputs[0].token_ids) for d in done) / seconds
        print("RESULT " + json.dumps({"rate": rate}), flush=True)


if __name__ == "__main__":
    main()
