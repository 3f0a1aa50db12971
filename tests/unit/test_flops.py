"""FLOPs per token against closed forms, and the rate behind MFU."""

import time

import pytest
import torch

import moe_train.routers  # noqa: F401 (registers them)
from moe_train.config import ModelConfig, RouterConfig
from moe_train.flops import MatmulRate, count_flops, matmul_rate, measured_matmul_rate, published_peak


def model(router: dict | None = None, **keys) -> ModelConfig:
    keys = {
        "hidden_size": 48,
        "num_layers": 3,
        "num_heads": 6,
        "num_experts": 5,
        "ffn_hidden_size": 20,
        "vocab_size": 70,
    } | keys
    router = {"name": "topk", "top_k": 2} | (router or {})
    return ModelConfig(router=RouterConfig.registry[router["name"]](**router), **keys)


FLAGSHIP = {
    "hidden_size": 1280,
    "num_layers": 24,
    "num_heads": 20,
    "head_dim": 64,
    "num_experts": 16,
    "ffn_hidden_size": 448,
    "vocab_size": 96512,
}


def test_flagship_with_a_linear_router():
    flops = count_flops(model({"top_k": 4}, **FLAGSHIP), 4096)
    assert flops.attention == 24 * 4 * 1280 * 1280
    assert flops.experts == 24 * 4 * 3 * 1280 * 448
    assert flops.router == 24 * 1280 * 16
    assert flops.head == 1280 * 96512
    assert round(flops.matmul_params / 1e6, 1) == 446.5
    assert round(flops.causal / 1e9, 3) == 3.434
    assert round(flops.full / 1e9, 3) == 4.189


@pytest.mark.parametrize(("size", "megaflop"), [(128, 38), (256, 104)])
def test_flagship_with_a_recurrent_router(size, megaflop):
    flops = count_flops(model({"name": "recurrent", "top_k": 4, "router_size": size}, **FLAGSHIP), 4096)
    # projector, the GRU's two matrices and the scorer, at each of the 24 layers although the cell exists once
    assert flops.router == 24 * (1280 * size + 6 * size * size + 16 * size)
    assert round(6 * flops.router / 1e6) == megaflop


def test_every_part_has_its_closed_form():
    config = model(
        num_kv_heads=2, head_dim=10, shared_expert_size=16, num_dense_layers=1, dense_ffn_hidden_size=64, qk_norm=True
    )
    flops = count_flops(config, 32)
    assert flops.attention == 3 * (48 * 60 + 2 * 48 * 20 + 60 * 48)
    assert flops.experts == 2 * 2 * 3 * 48 * 20
    assert flops.shared_experts == 2 * 3 * 48 * 16
    assert flops.dense == 3 * 48 * 64
    assert flops.router == 2 * 48 * 5
    assert flops.head == 48 * 70
    assert flops.attention_core == 3 * 12 * 60 * 32
    assert flops.full - flops.causal == flops.attention_core / 2
    assert flops.causal == 6 * flops.matmul_params + 3 * 6 * 60 * 32


def test_blocks_without_experts_are_dense():
    every_other = count_flops(model(moe_layer_freq=2), 32)
    assert (every_other.experts, every_other.dense, every_other.router) == (2 * 2 * 3 * 48 * 20, 3 * 48 * 40, 2 * 48 * 5)
    assert count_flops(model(moe_layer_freq=[1, 0, 1]), 32) == every_other


def test_tied_embeddings_still_pay_for_the_head():
    assert count_flops(model(tie_embeddings=True), 32) == count_flops(model(), 32)


def test_cell_without_projector_reads_hidden_rows():
    flops = count_flops(model({"name": "recurrent", "router_size": 8, "cell": "lstm", "projector": "shared"}), 32)
    assert flops.router == 3 * (4 * 8 * 48 + 4 * 8 * 8 + 5 * 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_rate_is_quick_and_plausible(dtype):
    start = time.perf_counter()
    rate = measured_matmul_rate(torch.device("cpu"), dtype, seconds=0.1)
    assert time.perf_counter() - start < 10
    assert 1e8 < rate < 1e15


def test_cpu_says_that_its_rate_was_measured(monkeypatch):
    monkeypatch.setattr("moe_train.flops.measured_matmul_rate", lambda *_: 5e9)
    assert matmul_rate(torch.device("cpu"), torch.float32) == MatmulRate(5e9, "measured matmul rate")


def test_a_known_gpu_says_that_its_rate_is_a_peak(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr("moe_train.flops.measured_matmul_rate", lambda *_: 5e12)
    cuda = torch.device("cuda", 0)
    assert matmul_rate(cuda, torch.bfloat16) == MatmulRate(989e12, "peak of NVIDIA H200")
    assert matmul_rate(cuda, torch.float32) == MatmulRate(5e12, "measured matmul rate")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA GeForce RTX 4090")
    assert matmul_rate(cuda, torch.bfloat16) == MatmulRate(5e12, "measured matmul rate")


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA A10", None),
    ],
)
def test_published_peaks(name, teraflops):
    assert published_peak(name) == (teraflops and teraflops * 1e12)


@pytest.mark.gpu
def test_measured_rate_stays_below_the_peak():
    device = torch.device("cuda")
    peak = published_peak(torch.cuda.get_device_name(device)) or float("inf")
    assert 1e12 < measured_matmul_rate(device, torch.bfloat16) < peak
