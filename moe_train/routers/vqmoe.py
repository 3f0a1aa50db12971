"""VQMoE: experts chosen by a gate, and experts chosen by vector quantisation (arXiv 2411.19402).

Two branches share one set of experts. The continuous one is an ordinary top-k mixture F. In the discrete one the nearest of Q codes
chooses the expert, which gets a row moved a little towards its code; a softmax of two logits mixes the branches. As in the released
code (https://github.com/giangdip2410/VQMoE):

    j = argmin_j |x - e_j|^2                                                 e: [Q, D], the codes
    q = x + c sg(e_j - x)                                                    c: `contribution`; sg: no gradient
    V = LN(Expert_{j mod E}(LN(q)))                                          one LayerNorm for both places
    F = sum_k w_k Expert_k(x),  s = x . v_e / |v_e|                          v: [E, D]; w as in topk.py
    g = softmax(x W + b)                                                     W: [D, 2]
    y = g_0 F + g_1 V
    codebook loss = mean_d (e_j - sg x)^2,  commitment loss = mean_d (sg e_j - x)^2,  weighted 0.08 and 0.25 * 0.08

`straight_through: official` is q = (1 - c) x + c sg(e_j - x), as released: its value is (1 - 2 c) x + c e_j and its gradient 1 - c.
`codebook: cosine` takes the code at the smallest angle, at the row's own length; `ema` codes are not trained but are running means of
the rows that chose them (arXiv 1711.00937, appendix A.1; no codebook loss). A code that too few rows choose is moved onto a random
row of the step. `branches: discrete` is the fine-tuning stage: y = V alone, one expert per token, no gate, codes frozen.

State: none. Buffers: usage [Q], a running share of the rows of each code; the codes themselves (`ema`), or how far dead codes were
moved [Q, D]. Cost per token: a linear gate's 2 D E FLOP, 2 D Q for the distances, 4 D for the mixing; top_k + 1 experts, whose rows
travel in one dispatch of 2 rows per token. Codes depend on a token alone, and updates act on later steps only: causal.

Traps: the released recipe has top_k = 1 and divides the chosen score by itself, so its gate gets no gradient and stays as it was drawn;
here the gate's own probability is the weight (`renormalize: false`). It loses its codebook loss on several GPUs, never switches its
balance loss on, its LayerNorm is also the block's, and its discrete branch has no dropout of hidden units (a transformer_xl block
here has it in both). c is small, so the discrete branch sees nearly x, and what counts is the choice
of the expert; watch `code_entropy` in the metrics (ln Q = all codes in even use). The balance loss and tokens_per_expert are about
the continuous branch.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import Backend
from moe_train.config import ModelConfig, Probability
from moe_train.model.init import Constant, Normal, Orthogonal
from moe_train.model.routing import BatchInfo, ExpertCall, Routing, register
from moe_train.routers.balance import count_choices
from moe_train.routers.topk import TokenChoice, TokenChoiceConfig

GAIN = 0.32  # of the experts' embeddings
NORM_EPS = 1e-5
SMALLEST_SHARE = 1e-30  # guards the division where a code's usage has decayed to nothing


class VQMoEConfig(TokenChoiceConfig):
    """VQMoE's keys."""

    name: Literal["vqmoe"] = "vqmoe"
    """VQMoE: a top-k branch and a vector-quantised branch over the same experts"""
    top_k: PositiveInt = 1
    """experts per token of the continuous branch; the discrete branch adds one"""
    renormalize: bool = False
    """divide the chosen scores by their sum"""
    branches: Literal["both", "discrete"] = "both"
    """discrete: the quantised branch alone with frozen codes, for fine-tuning"""
    codebook: Literal["base", "cosine", "ema"] = "base"
    """trained codes by distance or by angle, or running means of their rows"""
    num_codes: PositiveInt | None = None
    """codes; code j belongs to expert j mod num_experts; default num_experts"""
    contribution: Annotated[float, Field(ge=0.0, le=1.0)] = 0.05
    """how far a row is moved towards its code"""
    straight_through: Literal["clean", "official"] = "clean"
    """what the discrete branch gets: (1 - c) x + c e with the gradient of x, or the released (1 - 2 c) x + c e"""
    codebook_weight: NonNegativeFloat = 0.08
    """weight of the codebook loss"""
    commitment_weight: NonNegativeFloat = 0.02
    """weight of the commitment loss"""
    code_decay: Probability = 0.99
    """share of a code's usage (and of an ema code) that a step leaves as it is"""
    dead_code_share: Probability = 0.1
    """a code is moved to a random row when its usage falls below this times 1 / num_codes; 0 = never"""

    def active_experts(self, model: ModelConfig) -> int:
        """Those of both branches."""
        return 1 if self.branches == "discrete" else self.top_k + 1

    def left_out(self) -> tuple[str, ...]:
        """The continuous branch, in fine-tuning without it."""
        return ("embedding", "mixer", "mixer_bias") if self.branches == "discrete" else ()

    def loss_weights(self) -> dict[str, float]:
        """Weight of each entry of Routing.losses."""
        return {**super().loss_weights(), "codebook": self.codebook_weight, "commitment": self.commitment_weight}


@register(VQMoEConfig)
class VQMoERouter(TokenChoice):
    """One layer of VQMoE; see the module's docstring."""

    config: VQMoEConfig
    reuses_parameters: ClassVar[bool] = True  # the norm of the discrete branch, before and after the experts
    codebook: Tensor
    moved: Tensor
    usage: Tensor

    def __init__(self, config: VQMoEConfig, model: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__(config, model, layer, kernels)
        size, self.num_experts = model.hidden_size, model.num_experts
        self.num_codes = config.num_codes or model.num_experts
        self.both = config.branches == "both"
        self.learning = self.both and not config.frozen
        if self.both:
            self.embedding = nn.Parameter(torch.empty(model.num_experts, size))
            self.mixer = nn.Parameter(torch.empty(2, size))
            self.mixer_bias = nn.Parameter(torch.empty(2))
        self.norm_weight = nn.Parameter(torch.empty(size))
        self.norm_bias = nn.Parameter(torch.empty(size))
        codes = torch.empty(self.num_codes, size)
        if config.codebook == "ema":
            self.register_buffer("codebook", codes)
        else:
            self.codebook = nn.Parameter(codes, requires_grad=self.both)
            self.register_buffer("moved", torch.empty_like(codes))
        self.register_buffer("usage", torch.empty(self.num_codes))
        normal = Normal(model.init_std)
        self.initial |= {"embedding": Orthogonal(GAIN), "mixer": normal, "mixer_bias": Constant(0.0), "codebook": normal}
        self.initial |= {"norm_weight": Constant(1.0), "norm_bias": Constant(0.0), "moved": Constant(0.0)}
        self.initial["usage"] = Constant(1.0 / self.num_codes)

    def forward(self, x: Tensor, state: Tensor, batch: BatchInfo, shared: nn.Module | None, memory: object = None) -> Routing:
        """x [B, S_local, D] -> Routing of 2 T rows: T of the continuous branch, then T of the discrete one (which may be alone)."""
        flat, codes = x.flatten(0, 1), self.codes()
        chosen = self._nearest(flat, codes)
        experts = (chosen % self.num_experts).int()[:, None]
        stats = {"tokens_per_code": count_choices(chosen[None], self.num_codes)[0]}
        if not self.both:
            stats["tokens_per_expert"] = count_choices(experts.view(1, -1), self.num_experts)[0]
            return Routing(torch.ones_like(experts, dtype=codes.dtype), experts, state, {}, stats, extra=(chosen,))
        routing = self.choose(x, F.normalize(self.embedding, dim=-1), state, batch)
        gates = (F.linear(flat, self.mixer.to(x.dtype)).to(codes.dtype) + self.mixer_bias).softmax(-1)
        ids, weights = routing.expert_ids, routing.weights * gates[:, :1]
        ids = torch.cat([ids, F.pad(experts, (0, ids.shape[1] - 1), value=-1)])
        weights = torch.cat([weights, torch.ones_like(weights)])
        return routing._replace(
            weights=weights,
            expert_ids=ids,
            losses=routing.losses | self._code_losses(flat, chosen, codes),
            stats=routing.stats | stats | (self._code_stats(flat, chosen, batch) if self.training and self.learning else {}),
            extra=(chosen, gates[:, 1:]),
        )

    def mix(self, x: Tensor, routing: Routing, experts: ExpertCall) -> Tensor:
        """x [B, S_local, D] -> g_0 F + g_1 V, or V alone. The weights of the continuous branch have g_0 in them."""
        flat, chosen = x.flatten(0, 1), routing.extra[0]
        moved = self._norm(self.quantise(flat, self._codes_of(flat, chosen, self.codes())))
        if not self.both:
            return self._norm(experts(moved, routing.expert_ids, routing.weights)).view_as(x)
        out = experts(torch.cat([flat, moved]), routing.expert_ids, routing.weights)
        continuous, discrete = out.chunk(2)
        return (continuous + routing.extra[1].to(x.dtype) * self._norm(discrete)).view_as(x)

    def codes(self) -> Tensor:
        """The codes [Q, D] as rows are compared with them: of length 1 under `cosine`."""
        if self.config.codebook == "ema":
            return self.codebook
        codes = self.codebook + self.moved
        return F.normalize(codes, dim=-1) if self.config.codebook == "cosine" else codes

    def quantise(self, x: Tensor, codes: Tensor) -> Tensor:
        """What the discrete branch gets of x [T, D] and its codes [T, D]; the codes get no gradient."""
        share = self.config.contribution
        kept = x if self.config.straight_through == "clean" else (1.0 - share) * x
        return kept + share * (codes.to(x.dtype) - x).detach()

    def active_params(self) -> int:
        """Rows are compared with every code, whether codes are parameters or not."""
        return super().active_params() + (self.codebook.numel() if self.config.codebook == "ema" else 0)

    @torch.no_grad()
    def after_step(self, stats: dict[str, Tensor], progress: float) -> None:
        """Follow the codes' usage and the rows of `ema` codes, and move dead codes."""
        super().after_step(stats, progress)
        if not self.learning:
            return
        config, counts = self.config, stats["tokens_per_code"].to(self.usage)
        share = counts / counts.sum()
        self.usage.lerp_(share, 1.0 - config.code_decay)
        dead = torch.zeros_like(share, dtype=torch.bool)
        if config.dead_code_share:
            dead = (self.usage < config.dead_code_share / self.num_codes) & (stats["code_samples"].to(share) == 1)
        if config.codebook == "ema":
            # With N' = decay N + (1 - decay) n and e' = (decay N e + (1 - decay) sum) / N', e' - e is this part of mean - e:
            rate = (1.0 - config.code_decay) * share / self.usage.clamp_min(SMALLEST_SHARE) * ~dead
            self.codebook.lerp_(stats["code_sums"].to(share) / counts.clamp_min(1)[:, None], rate[:, None])
        if config.dead_code_share:
            place = self.codebook if config.codebook == "ema" else self.moved
            place += dead[:, None] * stats["code_moves"].to(share)
            self.usage.copy_(torch.where(dead, 1.0 / self.num_codes, self.usage))

    @torch.no_grad()
    def _nearest(self, x: Tensor, codes: Tensor) -> Tensor:
        """The code of each row x [T, D]: [T] int64. Among equals the lower one."""
        closeness = x.to(codes.dtype) @ codes.t()
        if self.config.codebook != "cosine":
            closeness = closeness - codes.square().sum(-1) / 2
        return closeness.argmax(-1)

    def _codes_of(self, x: Tensor, chosen: Tensor, codes: Tensor) -> Tensor:
        """The code of each row x [T, D], [T, D] in the codes' dtype, with their gradient; under `cosine` of the row's length."""
        found = F.embedding(chosen, codes)
        if self.config.codebook == "cosine":
            found = found * x.detach().to(codes.dtype).norm(dim=-1, keepdim=True)
        return found

    def _code_losses(self, x: Tensor, chosen: Tensor, codes: Tensor) -> dict[str, Tensor]:
        config, found, losses = self.config, self._codes_of(x, chosen, codes), {}
        x = x.to(codes.dtype)
        if config.codebook_weight and config.codebook != "ema":
            losses["codebook"] = (found - x.detach()).square().mean(-1).sum()
        if config.commitment_weight:
            losses["commitment"] = (found.detach() - x).square().mean(-1).sum()
        return losses

    @torch.no_grad()
    def _code_stats(self, x: Tensor, chosen: Tensor, batch: BatchInfo) -> dict[str, Tensor]:
        """Sums over rows for `after_step`: those of each code (`ema`), and where dead codes may go."""
        stats, x = {}, x.to(self.usage.dtype)
        every = torch.arange(self.num_codes, device=x.device)
        if self.config.codebook == "ema":
            stats["code_sums"] = (chosen[:, None] == every).to(x.dtype).t() @ x
        if self.config.dead_code_share:
            # Each code draws each row of the step with probability 1 / token_count. One that draws exactly one row has a sample of
            # it that is a sum over rows, as every statistic, and the same under every layout.
            high, low = batch.random("dead_code", self.layer, 2).double().flatten(0, 1).unbind(-1)
            drawn = ((high + low / 2**24) * batch.token_count).long()
            sample = (drawn[:, None] == every).to(x.dtype)
            stats["code_samples"] = sample.sum(0)
            place = self.codebook if self.config.codebook == "ema" else self.codebook + self.moved
            stats["code_moves"] = sample.t() @ x - stats["code_samples"][:, None] * place
        return stats

    def _norm(self, x: Tensor) -> Tensor:
        wide = x.to(self.norm_weight.dtype)
        return F.layer_norm(wide, wide.shape[-1:], self.norm_weight, self.norm_bias, NORM_EPS).to(x.dtype)
