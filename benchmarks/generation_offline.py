"""vLLM's own `LLM.generate`, run in vLLM's environment: the bar for benchmarks/generation.py."""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    """Arguments as one JSON object; the result as one JSON line."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    a = json.loads(sys.argv[1])
    llm = LLM(a["model"], max_model_len=a["context"], max_num_seqs=64, **a["options"])
    params = SamplingParams(temperature=0, max_tokens=a["tokens"], ignore_eos=True)
    out = {}
    for streams in a["streams"]:
        rates = []
        for r in range(a["rounds"] + 1):
            prompts = [TokensPrompt(prompt_token_ids=ids) for ids in a["prompts"][str(streams)][r]]
            started = time.perf_counter()
            done = llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - started
            rates.append(sum(len(d.outputs[0].token_ids) for d in done) / seconds)
        out[streams] = rates[1:]
    print("RESULT " + json.dumps(out), flush=True)


if __name__ == "__main__":
    main()
