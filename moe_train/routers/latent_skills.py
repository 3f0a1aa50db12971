"""Latent skills: each source of text learns which experts it merges (arXiv 2202.13914), as SMEAR's authors compare it.

A document's label c has one logit for each expert of a layer; a relaxed Bernoulli variable for each document says which are taken:

    m_e = sigmoid(l_ce + ln u - ln(1 - u)), u ~ U(0, 1), in training;  m_e = sigmoid(l_ce) in evaluation     (temperature 1)
    p_e = m_e / (sum m + 1e-12);  W = sum_e p_e W_e;  y = SwiGLU(x; W)

The published learning rate of the logits is 10 times the model's. Here the parameter is w = l / lr_scale: under Adam, whose step does
not depend on the gradient's size, l then moves lr_scale times as fast. Published init: l ~ U(-1e-3, 1e-3).

State: none. Decoding needs the label alone. Cost: one merged expert per token; E / (tokens of a document) times that for merging.
Traps: the routing is the label's, so a corpus without labels learns one mixture for all; labels from `num_labels` on share rows of the
table (label mod num_labels); weight decay pulls w to 0, which is p = 1 / E.
"""

from typing import ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from moe_kernels import Backend
from moe_train.config import ModelConfig
from moe_train.model.experts import Merge
from moe_train.model.init import Uniform
from moe_train.model.routing import BatchInfo, Routing, register
from moe_train.routers.merging import MergingConfig, MergingRouter
from moe_train.routers.pooling import document_units, draw


class LatentSkillsConfig(MergingConfig):
    """Keys of latent skills."""

    reads_labels: ClassVar[bool] = True
    name: Literal["latent_skills"] = "latent_skills"
    """each label of text learns which experts it merges"""
    num_labels: PositiveInt = 8
    """rows of the table of logits; higher labels share them"""
    lr_scale: PositiveFloat = 10.0
    """learning rate of the logits, relative to the model's"""


@register(LatentSkillsConfig)
class LatentSkillsRouter(MergingRouter):
    """One layer; see the module's docstring."""

    config: LatentSkillsConfig

    def __init__(self, config: LatentSkillsConfig, model: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__(config, model, layer, kernels)
        self.skills = nn.Parameter(torch.empty(config.num_labels, model.num_experts))
        self.initial = {"skills": Uniform(1e-3 / config.lr_scale)}

    def active_params(self) -> int:
        """The table is looked up, once for each document."""
        return 0

    def forward(self, x: Tensor, state: Tensor, batch: BatchInfo, shared: nn.Module | None, memory: object = None) -> Routing:
        """x [B, S_local, D] -> Routing with one merged expert for each document; `state` passes through."""
        ids, places = document_units(batch)
        labels = batch.labels.flatten()[places] % self.config.num_labels
        logits = self.config.lr_scale * self.skills[labels]
        if self.training:
            uniform = draw(batch, places, "skills", self.layer, logits.shape[1])
            logits = logits + torch.logit(uniform).to(logits.dtype)
        taken = logits.sigmoid()
        probs = taken / (taken.sum(-1, keepdim=True) + 1e-12)
        return self.merge(Merge(probs, probs), ids, state)
