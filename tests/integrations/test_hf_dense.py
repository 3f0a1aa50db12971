"""A dense model of transformers as the start of one with experts: the experts compute what its MLPs did."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_train.data.tokenizer import ByteTokenizer
from moe_train.errors import UserError
from moe_train.hf.exporting import to_hf
from moe_train.hf.importing import from_hf
from moe_train.hf.native import logits_of, open_native
from moe_train.upcycle import upcycle

pytestmark = pytest.mark.integration

SETTINGS = {
    "vocab_size": ByteTokenizer.vocab_size,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(5))


def write_dense(folder: Path, kind: str, **settings: Any) -> Any:
    """A tiny dense model of transformers with weights that matter."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SETTINGS | settings))
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, float(parameter.ndim == 1), 0.1)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("llama", ["model.num_experts=4", "model.router={name: topk, top_k: 2}"]),
        (
            "llama",
            ["model.num_experts=8", "model.ffn_hidden_size=24", "model.router={name: recurrent, router_size: 8, top_k: 4}"],
        ),
        ("qwen3", ["model.num_experts=6", "model.ffn_hidden_size=16", "model.router={name: topk, top_k: 3}"]),
    ],
)
@torch.no_grad()
def test_experts_from_a_dense_model_compute_what_it_does(kind: str, words: list[str], tmp_path: Path) -> None:
    theirs = write_dense(tmp_path / "theirs", kind)(input_ids=TOKENS).logits
    assert from_hf(tmp_path / "theirs", tmp_path / "dense", "bytes").within()
    said = upcycle(tmp_path / "dense", tmp_path / "experts", words)
    assert "changes" not in said
    made = open_native(tmp_path / "experts")
    assert made.config.model.num_experts > 1
    assert float((logits_of(made.build(), TOKENS) - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())
    to_hf(tmp_path / "experts", tmp_path / "again")
    options = {} if "topk" in words[-1] else {"trust_remote_code": True}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32, **options).eval()
    assert type(again).__name__ not in ("LlamaForCausalLM", "Qwen3ForCausalLM")
    assert float((again(input_ids=TOKENS).logits - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


def test_dense_models_with_what_is_not_here_are_refused(tmp_path: Path) -> None:
    for number, settings in enumerate(({"mlp_bias": True}, {"attention_bias": True}, {"hidden_act": "gelu"})):
        write_dense(tmp_path / str(number), "llama", **settings)
        (key, value), *_ = settings.items()
        with pytest.raises(UserError, match=f"{key}={value}"):
            from_hf(tmp_path / str(number), tmp_path / "dense", "bytes")
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    write_dense(tmp_path / "scaled", "llama", rope_parameters=scaled | {"original_max_position_embeddings": 32})
    with pytest.raises(UserError, match="rope_type=llama3"):
        from_hf(tmp_path / "scaled", tmp_path / "dense", "bytes")
    assert not (tmp_path / "dense").exists()
