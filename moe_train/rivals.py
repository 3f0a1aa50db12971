"""Other projects' models in the shape of a run, behind the two calls that a benchmark makes of an engine.

A rival gets the run's batches, numbers, clipping and fused AdamW, and whatever settings its own project calls fastest.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from moe_train.config import Config, Conflict
from moe_train.data.loader import StepBatch
from moe_train.errors import UserError
from moe_train.optim import clip_gradients, make_optimizer
from moe_train.parallel.mesh import World


class Steps(Protocol):
    """What is measured: `moe_train.engine.base.Engine`'s step."""

    def forward_backward(self, batch: StepBatch, mark: Callable[[str], None]) -> object:
        """Gradients of one step; `mark` is told after each forward and each backward pass."""
        ...

    def step(self) -> float:
        """Clip and update; the gradient norm before clipping."""
        ...


Maker = Callable[[Config, World], Steps]


def load_rival(name: str) -> tuple[Maker, dict[str, str]]:
    """Import what the rival `name` (hf) needs: its maker, and the versions to record. Raises UserError where it is not installed."""
    if name != "hf":
        raise ValueError(f"no rival is called {name!r}")
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"--rival hf: transformers cannot be imported ({error}); pip install 'moe_train[hf]'") from None
    return lambda config, world: Mixtral(transformers, config, world), {"transformers": transformers.__version__}


class Mixtral:
    """Hugging Face transformers' Mixtral with PyTorch's attention and its grouped matrix products, in the compute dtype throughout.

    It trains without its balance loss, which would only cost it time, and in half precision without fp32 masters, which ours have.
    """

    def __init__(self, transformers: Any, config: Config, world: World) -> None:
        if problems := conflicts(config):
            raise UserError("\n".join([f"--rival hf: {len(problems)} problem(s)", *(f"  {p}" for p in problems)]))
        self.config, self.world = config, world
        self.model = build_mixtral(transformers, config).to(world.device, world.dtype).train()
        self.optimizer = make_optimizer(self.model, config.optim)

    def forward_backward(self, batch: StepBatch, mark: Callable[[str], None]) -> float:
        """Gradients of one step; its cross entropy per target."""
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for micro in batch.microbatches:
            tokens, targets = micro.tokens.to(self.world.device), micro.targets.to(self.world.device).contiguous()
            output = self.model(
                input_ids=tokens, labels=targets, shift_labels=targets, num_items_in_batch=batch.target_count, use_cache=False
            )
            mark("forward")
            output.loss.backward()
            mark("backward")
            total += float(output.loss.detach())
        return total

    def step(self) -> float:
        """Clip and update; the gradient norm before clipping."""
        norm = float(clip_gradients(self.model.parameters(), self.config.optim.clip_norm))
        self.optimizer.step()
        return norm


def build_mixtral(transformers: Any, config: Config) -> torch.nn.Module:
    """Mixtral for causal language modelling in the run's shape, fp32 on the CPU, with its own initial values."""
    model = config.model
    shape = transformers.MixtralConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_size,
        num_local_experts=model.num_experts,
        num_experts_per_tok=model.router.top_k,
        max_position_embeddings=config.train.seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        rms_norm_eps=model.norm_eps,
        initializer_range=model.init_std,
        tie_word_embeddings=model.tie_embeddings,
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
    )
    return transformers.MixtralForCausalLM(shape)


def conflicts(config: Config) -> list[Conflict]:
    """What a run may have and Mixtral has not."""
    model, found = config.model, []
    keys = {"block": "llama", "shared_expert_size": 0, "num_dense_layers": 0, "moe_layer_freq": 1, "qk_norm": False}
    for key, off in keys.items():
        if (value := getattr(model, key)) != off:
            found.append(Conflict(f"model.{key}", value, "Mixtral has no such part", f"set it to {str(off).lower()}"))
    if config.data.train and config.data.mask_documents:
        rule = "Mixtral's rows are one document each"
        found.append(Conflict("data.mask_documents", True, rule, "set it to false, or leave data.train out for random tokens"))
    return found
