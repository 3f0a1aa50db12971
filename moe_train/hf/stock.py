"""Architectures of transformers that compute what a plain top-k decoder computes: which settings and which weights become which.

| ours | MixtralForCausalLM | Qwen3MoeForCausalLM | OlmoeForCausalLM |
|---|---|---|---|
| `qk_norm` | false | true (each head) | width (all heads together) |
| `router.renormalize` | true | `norm_topk_prob` | `norm_topk_prob` |
| dense layers | refused | `mlp_only_layers`, `intermediate_size` | refused |
| `head_dim` | `head_dim` | `head_dim` | must be hidden_size / num_heads |
| `ffn_hidden_size` | `intermediate_size` | `moe_intermediate_size` | `intermediate_size` |

`qk_norm` decides the architecture. A model with one expert in each layer, which every token visits with weight 1, is dense, and becomes
LlamaForCausalLM, or Qwen3ForCausalLM with `qk_norm` of each head; its router has no place there. Sizes, `rope_theta`, `norm_eps`,
`tie_embeddings` and `init_std` have a place in all. A shared expert, sigmoid scores, groups of experts and a capacity have a place
in none.

Shapes: E experts, F expert width, D hidden.
"""

from dataclasses import dataclass
from typing import Any

from moe_train.config import Conflict, ModelConfig
from moe_train.errors import UserError

Names = str | list["Names"]  # of a tensor, or of the tensors that it is stacked from


@dataclass(frozen=True)
class Stock:
    """One architecture: how transformers calls it and its tensors, and what it has."""

    model_type: str
    class_name: str
    block: str = "mlp"  # the part of a layer that holds gate and experts
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    expert_size: str = "intermediate_size"  # the key of an expert's width
    qk_norm: bool | str = False
    always_renormalizes: bool = False
    has_dense_layers: bool = False
    has_head_dim: bool = True
    dense: bool = False  # an MLP in the place of gate and experts


ARCHITECTURES = (
    Stock("mixtral", "MixtralForCausalLM", "block_sparse_moe", ("w1", "w3", "w2"), always_renormalizes=True),
    Stock("qwen3_moe", "Qwen3MoeForCausalLM", expert_size="moe_intermediate_size", qk_norm=True, has_dense_layers=True),
    Stock("olmoe", "OlmoeForCausalLM", qk_norm="width", has_head_dim=False),
    Stock("llama", "LlamaForCausalLM", dense=True),
    Stock("qwen3", "Qwen3ForCausalLM", qk_norm=True, dense=True),
)

_OUTSIDE = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_INSIDE = {
    "attention_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "attention.q.weight": "self_attn.q_proj.weight",
    "attention.k.weight": "self_attn.k_proj.weight",
    "attention.v.weight": "self_attn.v_proj.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}


def find_stock(model: ModelConfig) -> Stock:
    """The architecture that computes what `model` describes. Raises UserError naming every setting that none has."""
    fitting = [stock for stock in ARCHITECTURES if stock.qk_norm == model.qk_norm]
    stock = next((stock for stock in fitting if stock.dense == (model.num_experts == 1)), fitting[0])
    if problems := stock_conflicts(stock, model):
        lines = [f"{stock.class_name}: {len(problems)} setting(s) that it has no place for", *(f"  {p}" for p in problems)]
        raise UserError("\n".join(lines))
    return stock


def stock_conflicts(stock: Stock, model: ModelConfig) -> list[Conflict]:
    """What `model` has and transformers' architecture has not."""
    remedy = "export with --remote-code, which brings its own modeling file"
    router, found = model.router, []
    if model.block != "llama":
        return [block_conflict(model)]
    if router.name != "topk":
        return [Conflict("model.router.name", router.name, f"{stock.class_name} routes by a linear gate", remedy)]
    values: dict[str, Any] = {key: getattr(router, key) for key in ("scores", "num_groups", "renormalize", "bias")}
    off: dict[str, Any] = {"scores": "softmax", "num_groups": 1, "bias": False}
    if stock.always_renormalizes:
        off["renormalize"] = True
    for key, only in off.items():
        if values[key] != only:
            rule = f"{stock.class_name} has only {str(only).lower()}"
            found.append(Conflict(f"model.router.{key}", values[key], rule, remedy))
    if model.shared_expert_size:
        rule = f"{stock.class_name} has no expert that every token visits"
        found.append(Conflict("model.shared_expert_size", model.shared_expert_size, rule, remedy))
    if model.has_dense_layers and not stock.has_dense_layers:
        rule = f"{stock.class_name} has layers of one kind (Qwen3-MoE, with model.qk_norm, has dense layers beside experts)"
        where = "model.num_dense_layers" if model.num_dense_layers else "model.moe_layer_freq"
        found.append(Conflict(where, model.num_dense_layers or model.moe_layer_freq, rule, remedy))
    if not stock.has_head_dim and model.head_size * model.num_heads != model.hidden_size:
        rule = f"{stock.class_name} has hidden_size / num_heads={model.hidden_size / model.num_heads:g}"
        found.append(Conflict("model.head_dim", model.head_size, rule, remedy))
    return found + export_conflicts(model)


def block_conflict(model: ModelConfig) -> Conflict:
    """Only Llama-style blocks are exported."""
    remedy = "use launch/evaluate.py and launch/generate.py"
    return Conflict("model.block", model.block, "is not exported: only llama is", remedy)


def export_conflicts(model: ModelConfig) -> list[Conflict]:
    """What no exported model has: a capacity, which depends on a row's length and so changes with every token; a head of classes."""
    found = []
    if model.capacity_factor is not None:
        rule = "an exported model is dropless, since the limit would change with every token that is generated"
        remedy = "add model.capacity_factor=null to the command"
        found.append(Conflict("model.capacity_factor", model.capacity_factor, rule, remedy))
    if model.num_classes is not None:
        rule = "only models that write text are exported, and this one chooses a class"
        found.append(Conflict("model.num_classes", model.num_classes, rule, "export the model that it was made from"))
    return found


def to_settings(stock: Stock, model: ModelConfig, seq_len: int) -> dict[str, Any]:
    """The keys of transformers' config.json for `model`."""
    router: Any = model.router
    settings: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        stock.expert_size: model.ffn_hidden_size,
        "max_position_embeddings": seq_len,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
    }
    if stock.has_head_dim:
        settings["head_dim"] = model.head_size
    if stock.dense:
        return settings
    experts = {"num_experts": model.num_experts, "num_experts_per_tok": router.top_k}
    settings |= experts | {"router_aux_loss_coef": router.balance_weight}
    if not stock.always_renormalizes:
        settings["norm_topk_prob"] = router.renormalize
    if stock.has_dense_layers:
        settings["mlp_only_layers"] = [layer for layer in range(model.num_layers) if layer not in model.moe_layers]
        settings["intermediate_size"] = model.dense_size
    return settings


def from_settings(settings: dict[str, Any]) -> tuple[Stock, dict[str, Any]]:
    """The architecture and the `model` section that a config.json of transformers, with defaults filled in, describes.

    Raises UserError naming every setting that has no place here.
    """
    kind = settings.get("model_type")
    stock = next((stock for stock in ARCHITECTURES if stock.model_type == kind), None)
    if stock is None:
        known = ", ".join(stock.model_type for stock in ARCHITECTURES)
        raise UserError(f"model_type={kind}: cannot be imported; the architectures that can are {known}")
    if problems := _foreign(settings):
        raise UserError("\n".join([f"{kind}: {len(problems)} setting(s) cannot be imported", *(f"  {p}" for p in problems)]))
    layers, dense = settings["num_hidden_layers"], settings.get("mlp_only_layers") or []
    step = settings.get("decoder_sparse_step") or 1
    placed = [int(layer not in dense and (layer + 1) % step == 0) for layer in range(layers)]
    model = {
        "vocab_size": settings["vocab_size"],
        "hidden_size": settings["hidden_size"],
        "num_layers": layers,
        "num_heads": settings["num_attention_heads"],
        "num_kv_heads": settings["num_key_value_heads"],
        "head_dim": settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"],
        "num_experts": 1 if stock.dense else settings.get("num_experts") or settings["num_local_experts"],
        "ffn_hidden_size": settings[stock.expert_size],
        "moe_layer_freq": 1 if all(placed) else placed,
        "dense_ffn_hidden_size": settings["intermediate_size"] if stock.has_dense_layers else None,
        "rope_theta": settings["rope_parameters"]["rope_theta"],
        "norm_eps": settings["rms_norm_eps"],
        "init_std": settings["initializer_range"],
        "tie_embeddings": settings["tie_word_embeddings"],
        "qk_norm": stock.qk_norm,
        "router": _router_of(stock, settings),
    }
    return stock, model


def _router_of(stock: Stock, settings: dict[str, Any]) -> dict[str, Any]:
    if stock.dense:  # its one score is 1, whatever its weight is
        return {"name": "topk", "top_k": 1, "renormalize": False, "balance_weight": 0.0}
    return {
        "name": "topk",
        "top_k": settings["num_experts_per_tok"],
        "renormalize": settings.get("norm_topk_prob", True),
        "balance_weight": settings["router_aux_loss_coef"],
    }


def _foreign(settings: dict[str, Any]) -> list[Conflict]:
    """Settings of transformers that have no counterpart here."""
    only = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
        "clip_qkv": None,
        "attention_dropout": 0.0,
        "router_jitter_noise": 0.0,
    }
    found = [
        Conflict(key, settings[key], f"only {value} is known here", "convert another model")
        for key, value in only.items()
        if key in settings and settings[key] != value
    ]
    kind = settings["rope_parameters"].get("rope_type", "default")
    if kind != "default":
        found.append(Conflict("rope_parameters.rope_type", kind, "only default is known here", "convert another model"))
    return found


def names_of(stock: Stock, name: str, experts: int) -> Names | None:
    """What transformers calls our tensor `name`: a name, or the names of the tensors that it is stacked from; None = nothing."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, number, rest = name.split(".", 2)
    layer, (gate, up, down) = f"model.layers.{number}", stock.parts
    if rest in _INSIDE:
        return f"{layer}.{_INSIDE[rest]}"
    if rest == "mlp.gate_up":
        return [f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight"]
    inside = [f"{layer}.{stock.block}" + f".experts.{expert}" * (not stock.dense) for expert in range(experts)]
    known: dict[str, Names | None] = {
        "mlp.router.weight": None if stock.dense else f"{layer}.{stock.block}.gate.weight",
        "mlp.router.fractions": None,  # the last step's loads, for the next step's balance loss
        "mlp.experts.gate_up": [[f"{expert}.{gate}.weight", f"{expert}.{up}.weight"] for expert in inside],
        "mlp.experts.down": [f"{expert}.{down}.weight" for expert in inside],
    }
    return known[rest]
