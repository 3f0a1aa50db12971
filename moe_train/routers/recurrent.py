"""RMoE: the layerwise recurrent router (arXiv 2408.06793).

A token's router at layer l sees the token's hidden row and a state that a recurrent cell carries from layer to layer. The recurrence
runs over depth and never over time, so tokens do not mix and decoding needs no router cache. One cell is shared by all layers; each
layer owns its projector A_l and its scorer C_l. Equations 3 to 5 of the paper, with the candidate's two matrices as in its code:

    z = x A_l                                          A_l: [D, P] (`projector: layer`), or none (`projector: shared`: z = x)
    r = sigmoid(z W_ir + b_ir + h W_hr + b_hr)
    u = sigmoid(z W_iz + b_iz + h W_hz + b_hz)
    n = tanh(z W_in + b_in + r * (h W_hn + b_hn))
    h' = (1 - u) n + u h                               (torch.nn.GRUCell)
    s = h' C_l                                         C_l: [P, E]; then top-k as in topk.py; with `bias`, z and s have biases

State: h, fp32, P floats per token (lstm: h and c, 2P), zero before the first layer. `passing: none` is the paper's NP ablation (the
cell starts from zero at each layer), `detached` passes values without gradients.

Variants of the paper. Gate residual ("r"): with a = `residual` (and `passing: none`), experts are chosen from and weighted by
softmax(s_l) + a softmax(s_l-1); the state carries the last layer's E scores too, and `detach_residual` stops their gradient
("detach-r"). The paper does not say whether the sum is divided by 1 + a; where `renormalize` is on it makes no difference.
XMoE + GRU: `scoring: cosine` scores the state as xmoe.py does hidden rows, in `cosine_size` dimensions. Fine-tuning with a frozen
router is `frozen`; with a frozen router and GRU, `frozen` and `frozen_cell`.

Cost per token: 2 D P + 12 P^2 + 2 P E FLOP with a GRU (RNN: 4 P^2, LSTM: 16 P^2), and 4 P bytes of state to read and to write.

Traps: the initial logits are about 15 times flatter than a linear gate's (small A and C multiply), so part of a comparison may be
scale: `initial_logits: linear` starts with a larger C, so that the first layer's logits spread as a linear gate's do (deeper ones,
whose state has grown, up to a fifth wider). The cell's weights belong to every layer, so a layout that puts layers on different
ranks must sum their gradients. The released code cannot be built as it stands, leaves A and C without initial values, and has no state
after a dense layer; here dense layers pass h on. It takes its balance loss over the tokens of all layers together, where layers that
collapse onto different experts look balanced; here each layer has its own.
"""

from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import Backend, TopK
from moe_train.config import Conflict, ModelConfig
from moe_train.model.init import Constant, Normal, Uniform
from moe_train.model.routing import BatchInfo, Routing, register
from moe_train.routers.cosine import CosineScorer
from moe_train.routers.topk import TokenChoice, TokenChoiceConfig, with_bias

GATES = {"gru": 3, "rnn": 1, "lstm": 4}


class RecurrentConfig(TokenChoiceConfig):
    """RMoE's keys."""

    name: Literal["recurrent"] = "recurrent"
    """RMoE: a recurrent cell carries router state from layer to layer"""
    router_size: PositiveInt = 128
    """width P of the cell"""
    cell: Literal["gru", "rnn", "lstm"] = "gru"
    """recurrent cell"""
    projector: Literal["layer", "shared"] = "layer"
    """layer: each layer projects its hidden rows to P; shared: the cell reads hidden rows directly"""
    passing: Literal["full", "none", "detached"] = "full"
    """what goes from layer to layer: the state with its gradient, nothing, or the state alone"""
    residual: NonNegativeFloat = 0.0
    """weight of the previous layer's scores, which are added to this layer's (the paper: 0.5 or 1 with passing=none); 0 = none"""
    detach_residual: bool = False
    """no gradient through the previous layer's scores"""
    scoring: Literal["linear", "cosine"] = "linear"
    """how the state is scored: by a matrix, or by its cosine to the experts in a few dimensions (X-MoE)"""
    cosine_size: PositiveInt = 16
    """dimensions of cosine scoring"""
    temperature: PositiveFloat = 0.3
    """initial temperature of cosine scoring"""
    initial_logits: Literal["published", "linear"] = "published"
    """spread of the first logits: as published, some 15 times flatter than a linear gate's, or as a linear gate's"""
    frozen_cell: bool = False
    """the recurrent cell is not trained (fine-tuning)"""
    bias: bool = False
    """biases of projector and scorer, as the paper's small models have"""

    def conflicts(self, model: ModelConfig) -> list[Conflict]:
        """A temperature sets the spread of cosine logits."""
        found = super().conflicts(model)
        if self.scoring == "cosine" and self.initial_logits == "linear":
            rule = "the spread of cosine logits is set by model.router.temperature"
            found.append(Conflict("model.router.initial_logits", "linear", rule, "leave it out, or use scoring=linear"))
        if self.scoring == "cosine" and self.bias:
            rule = "a cosine has no bias"
            found.append(Conflict("model.router.bias", True, rule, "leave it out, or use scoring=linear"))
        return found


class Cell(nn.Module):
    """The recurrent cell: one copy, owned by the decoder, lent to every layer. Weights as in torch.nn.GRUCell, RNNCell, LSTMCell."""

    def __init__(self, kind: str, input_size: int, size: int, kernels: Backend) -> None:
        super().__init__()
        self.kind, self.size, self.kernels = kind, size, kernels
        rows = GATES[kind] * size
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size))
        self.weight_hh = nn.Parameter(torch.empty(rows, size))
        self.bias_ih = nn.Parameter(torch.empty(rows))
        self.bias_hh = nn.Parameter(torch.empty(rows))
        self.initial = {name: Uniform(size**-0.5) for name, _ in self.named_parameters()}

    def forward(self, z: Tensor, state: Tensor) -> Tensor:
        """z [T, input] and state [T, R] -> next state [T, R]; its first `size` columns are what the scorer reads."""
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        if self.kind == "gru":
            return self.kernels.gru_step(z, state, *weights)
        h, c = state.split(self.size, -1) if self.kind == "lstm" else (state, state)
        gates = _lift(z, state) @ self.weight_ih.t() + self.bias_ih + h @ self.weight_hh.t() + self.bias_hh
        if self.kind == "rnn":
            return gates.tanh()
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return torch.cat([o.sigmoid() * c.tanh(), c], -1)


def _cell_columns(config: RecurrentConfig) -> int:
    return config.router_size * (2 if config.cell == "lstm" else 1)


def linear_std(config: RecurrentConfig, model: ModelConfig) -> float:
    """Standard deviation of C with which the first layer's logits spread as those of a linear gate with `model.init_std`.

    The cell's pre-activations are sums of many terms, so nearly normal; the mean square of h is taken over a sample of them.
    """
    size, std = config.router_size, model.init_std
    row = (
        std**2 * model.hidden_size * size if config.projector == "layer" else model.hidden_size
    )  # |z|^2 where x has mean square 1
    spread = ((row + 2) / (3 * size)) ** 0.5  # weights and the two biases are uniform in +-size^-1/2
    a, b, c = (spread * torch.randn(3, 1 << 16, generator=torch.Generator().manual_seed(0), device="cpu")).unbind()
    kinds = {"rnn": a.tanh(), "gru": a.sigmoid() * b.tanh(), "lstm": a.sigmoid() * (b.sigmoid() * c.tanh()).tanh()}
    mean_square = float(kinds[config.cell].square().mean())
    return std * (model.hidden_size / (size * mean_square)) ** 0.5


def _lift(z: Tensor, state: Tensor) -> Tensor:
    """z in the state's dtype (fp32, or fp64 in an fp64 model)."""
    return z.to(state.dtype)


@register(RecurrentConfig)
class RecurrentRouter(TokenChoice):
    """One layer of RMoE; see the module's docstring."""

    config: RecurrentConfig

    def __init__(self, config: RecurrentConfig, model: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__(config, model, layer, kernels)
        if config.projector == "layer":
            self.projector = nn.Parameter(torch.empty(config.router_size, model.hidden_size))
            self.initial["projector"] = Normal(model.init_std)
        self.scorer: nn.Parameter | CosineScorer
        if config.scoring == "cosine":
            self.scorer = CosineScorer(model, config.router_size, config.cosine_size, config.temperature)
        else:
            self.scorer = nn.Parameter(torch.empty(model.num_experts, config.router_size))
            std = model.init_std if config.initial_logits == "published" else linear_std(config, model)
            self.initial["scorer"] = Normal(std)
        self.projector_bias: nn.Parameter | None = None
        self.scorer_bias: nn.Parameter | None = None
        if config.bias:
            self.scorer_bias = nn.Parameter(torch.empty(model.num_experts))
            self.initial["scorer_bias"] = Constant(0.0)
        if config.bias and config.projector == "layer":
            self.projector_bias = nn.Parameter(torch.empty(config.router_size))
            self.initial["projector_bias"] = Constant(0.0)

    @staticmethod
    def state_size_of(config: RecurrentConfig, model: ModelConfig) -> int:
        """Columns of router state per token: the cell's, then the scores where a residual needs them."""
        return _cell_columns(config) + (model.num_experts if config.residual else 0)

    @staticmethod
    def make_shared(config: RecurrentConfig, model: ModelConfig, kernels: Backend) -> nn.Module:
        """The cell that all layers share."""
        input_size = config.router_size if config.projector == "layer" else model.hidden_size
        return Cell(config.cell, input_size, config.router_size, kernels).requires_grad_(not config.frozen_cell)

    def forward(self, x: Tensor, state: Tensor, batch: BatchInfo, shared: nn.Module | None, memory: object = None) -> Routing:
        """x [B, S_local, D], state [B, S_local, R] -> Routing with the next state."""
        assert shared is not None  # the decoder makes it with make_shared
        z = x
        if self.config.projector == "layer":
            bias = None if self.projector_bias is None else self.projector_bias.to(x.dtype)
            z = F.linear(x, self.projector.to(x.dtype), bias)
        columns = _cell_columns(self.config)
        passed, scores = state[..., :columns], state[..., columns:]
        before = {"full": passed, "none": torch.zeros_like(passed), "detached": passed.detach()}[self.config.passing]
        after = shared(z.flatten(0, 1), before.flatten(0, 1)).view_as(before)
        hidden = after[..., : self.config.router_size].to(x.dtype)
        rows, weight = self.scorer(hidden) if isinstance(self.scorer, CosineScorer) else (hidden, self.scorer)
        if self.scorer_bias is not None:
            rows, weight = with_bias(rows, weight, self.scorer_bias)
        if self.config.residual:
            return self._add_residual(self.score(rows, weight), after, scores, batch)
        return self.choose(rows, weight, after, batch)

    def _add_residual(self, choice: TopK, after: Tensor, previous: Tensor, batch: BatchInfo) -> Routing:
        """Choose from this layer's scores and the `previous` layer's [B, S_local, E], which are zero before the first."""
        config, state = self.config, torch.cat([after, choice.scores.view_as(previous)], -1)
        previous = previous.detach() if config.detach_residual else previous
        mixed = choice._replace(scores=choice.scores + config.residual * previous.flatten(0, 1))
        return self.route(self.take(mixed, self.best(mixed.scores)), state, batch)
