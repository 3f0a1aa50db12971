"""An export never holds a model twice: what is resident, mapped files included, beside the model's size."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
import transformers
from hf_models import write_checkpoint
from launches import ROOT

from moe_train.hf.exporting import to_hf
from moe_train.model.init import initialise

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is measured on Linux only"),
]

TOPK = {"name": "topk"}
MOST = 1.3  # times the model


PEAKS = """
import json, torch
from moe_train.hf.memory import peak_memory
with peak_memory() as ones:
    torch.ones(50_000_000)
with peak_memory() as nothing:
    pass
print(json.dumps([ones, nothing]))
"""


def test_the_peak_is_what_a_block_adds() -> None:
    """Also what it has given back, and not what was there before. In a process that has nothing else to give back."""
    done = subprocess.run([sys.executable, "-c", PEAKS], cwd=ROOT, capture_output=True, text=True, check=True)
    ones, nothing = json.loads(done.stdout)
    assert 2e8 <= ones["peak_bytes"] < 2.4e8 < ones["base_bytes"] + ones["peak_bytes"]
    assert nothing["peak_bytes"] < 1e7


@pytest.mark.parametrize("remote_code", [False, True])
def test_no_file_is_mapped_while_transformers_computes(remote_code: bool, tmp_path: Path) -> None:
    native = write_checkpoint(tmp_path / "native", router=TOPK)
    mapped: list[bool] = []

    def look(module: Any, _: Any) -> None:
        if isinstance(module, transformers.PreTrainedModel):
            mapped.append(".safetensors" in Path("/proc/self/maps").read_text())

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        to_hf(native.path, tmp_path / "hf", remote_code=remote_code)
    finally:
        hook.remove()
    assert mapped
    assert not any(mapped)


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--remote-code"]], ids=["stock", "remote"])
def test_an_export_takes_little_more_than_the_model(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_models, "_drawn", lambda model: initialise(model, 0) or model)
    shape = {"hidden_size": 512, "num_layers": 12, "num_heads": 8, "num_experts": 16, "ffn_hidden_size": 512}
    write_checkpoint(tmp_path / "native", router=TOPK, **shape)
    call = ["to-hf", tmp_path / "native", tmp_path / "hf", "--memory", tmp_path / "rows.jsonl", *words]
    done = subprocess.run(
        [sys.executable, "launch/convert.py", *map(str, call)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert row["model_bytes"] > 6e8
    assert 1.0 < row["ratio"] <= MOST
    assert row["ratio"] == row["peak_bytes"] / row["model_bytes"]
    assert f"memory at most {row['ratio']:.2f} x" in done.stdout
