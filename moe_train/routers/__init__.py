"""One file per routing method; importing this package registers them all."""

from moe_train.config import RouterConfig
from moe_train.routers import (  # noqa: F401 (importing registers)
    acmoe,
    adamix,
    aux_free,
    cosine,
    dselect_k,
    ensemble,
    expert_choice,
    hash,
    hypermoe,
    latent_skills,
    mlp,
    monolithic,
    random,
    recurrent,
    reinforce,
    smear,
    smoe_dropout,
    st_gumbel,
    stablemoe,
    tag,
    topk,
    vqmoe,
    xmoe,
)


def registry() -> dict[str, type[RouterConfig]]:
    """Name -> configuration class of every registered router."""
    return dict(RouterConfig.registry)
