"""`python vllm_greedy.py FOLDER`: what vLLM makes of an exported folder, as JSON in the last line that it writes.

Standard input: {"prompt": ids, "ids": n} as JSON.
`tokens`: 64 greedy ones below n. `logprobs`: of the prompt's tokens but the first. `model`: the class that it has loaded.
"""

import json
import os
import sys
from typing import Any

LENGTH = 64
# One process, no memory taken beyond a small cache, no network. vLLM reads these when it is imported.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
os.environ |= {"VLLM_HOST_IP": "127.0.0.1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def main(folder: str, prompt: list[int], ids: int) -> dict[str, Any]:
    """vLLM's own loader, model and attention, in fp32."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    llm = LLM(model=folder, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=1, trust_remote_code=False)
    sampling = SamplingParams(
        temperature=0, max_tokens=LENGTH, ignore_eos=True, prompt_logprobs=0, allowed_token_ids=list(range(ids))
    )
    (found,) = llm.generate({"prompt_token_ids": prompt}, sampling)
    return {
        "tokens": list(found.outputs[0].token_ids),
        "logprobs": [place[token].logprob for place, token in zip(found.prompt_logprobs[1:], prompt[1:], strict=True)],
        "model": llm.apply_model(lambda model: type(model).__name__)[0],
    }


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    print("\n" + json.dumps(main(sys.argv[1], asked["prompt"], asked["ids"])), flush=True)
