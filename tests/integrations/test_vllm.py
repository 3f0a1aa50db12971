"""Exported folders in vLLM on CPU: its own loader and models, our logits and greedy text (docs/huggingface.md: how to install it)."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import write_checkpoint
from vllm_greedy import LENGTH

from moe_train.hf.exporting import to_hf
from moe_train.hf.native import logits_of

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm on CPU (docs/huggingface.md)"),
]

# vLLM's attention on CPU has heads of 32, 64, 80, 96, 112, 128, ...
MODEL = {"hidden_size": 128, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "num_experts": 4, "ffn_hidden_size": 64}
ONE = {"name": "topk", "top_k": 1, "renormalize": False, "balance_weight": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": {"router": {"name": "topk"}},
    "Qwen3MoeForCausalLM": {"router": {"name": "topk", "renormalize": False}, "qk_norm": True, "moe_layer_freq": [1, 0, 1]},
    "OlmoeForCausalLM": {"router": {"name": "topk", "renormalize": False}, "qk_norm": "width"},
    "LlamaForCausalLM": {"router": ONE, "num_experts": 1},
    "Qwen3ForCausalLM": {"router": ONE, "num_experts": 1, "qk_norm": True, "tie_embeddings": True},
}


@pytest.mark.parametrize("name", MODELS)
def test_vllm_says_what_we_say(name: str, tmp_path: Path) -> None:
    native = write_checkpoint(tmp_path / "native", seq_len=128, **MODEL | MODELS[name])
    to_hf(native.path, tmp_path / "hf")
    ours, ids = native.build(), native.tokenizer.eod
    prompt = native.tokenizer.encode(b"def main(argv):\n    parser = argparse").tolist()
    theirs = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("vllm_greedy.py")), str(tmp_path / "hf")],
        input=json.dumps({"prompt": prompt, "ids": ids}),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert theirs.returncode == 0, theirs.stderr[-3000:]
    found = json.loads(theirs.stdout.splitlines()[-1])
    assert found["model"] == name
    tokens = torch.tensor([prompt])
    logprobs = logits_of(ours, tokens)[0, :-1].double().log_softmax(-1).gather(-1, tokens[0, 1:, None]).flatten()
    assert torch.allclose(torch.tensor(found["logprobs"]).double(), logprobs, rtol=0.0, atol=1e-4)
    for _ in range(LENGTH):
        tokens = torch.cat([tokens, logits_of(ours, tokens)[:, -1, :ids].argmax(-1, keepdim=True)], 1)
    assert found["tokens"] == tokens[0, len(prompt) :].tolist()
    assert len(set(found["tokens"])) > 1
