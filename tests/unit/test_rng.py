"""Random generators come back from a checkpoint: those of each rank, or none."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from ranks import run_ranks

from moe_train.checkpoint.rng import RNG_FILE, restore_rng, rng_state
from moe_train.errors import UserError

CPU = torch.device("cpu")


def save_and_draw(folder: Path, device: torch.device = CPU) -> list[float]:
    """What this rank draws after the state was saved."""
    torch.manual_seed(100 + dist.get_rank())
    torch.rand(7, device=device)
    content = rng_state(device)
    if dist.get_rank() == 0:
        (folder / RNG_FILE).write_bytes(content)
    return torch.rand(5, device=device).tolist()


def restore_and_draw(folder: Path, device: torch.device = CPU) -> tuple[bool, list[float]]:
    torch.manual_seed(5)
    return restore_rng(folder, device), torch.rand(5, device=device).tolist()


def test_each_rank_goes_on_with_its_own_numbers_or_all_start_anew(tmp_path: Path) -> None:
    drawn = run_ranks(2, save_and_draw, tmp_path)
    assert drawn[0] != drawn[1]
    assert run_ranks(2, restore_and_draw, tmp_path) == [(True, drawn[0]), (True, drawn[1])]
    torch.manual_seed(5)
    assert run_ranks(1, restore_and_draw, tmp_path) == [(False, torch.rand(5).tolist())]


def refusals(folder: Path) -> list[str]:
    """What is said of a missing file, and of files that hold something else."""
    found = []
    kinds = [None, {}, {"cpu": torch.zeros(1, 5)}, {"cpu": torch.zeros(1, 5056)}, {"cpu": torch.zeros(1, 8, dtype=torch.uint8)}]
    for saved in kinds:
        if saved is not None:
            safetensors.torch.save_file(saved, folder / RNG_FILE)
        with pytest.raises(UserError) as caught:
            restore_rng(folder, CPU)
        found.append(str(caught.value))
    return found


def test_a_file_that_holds_no_generators_is_refused(tmp_path: Path) -> None:
    [found] = run_ranks(1, refusals, tmp_path)
    assert len(found) == 5
    assert all(text.startswith(f"{tmp_path / RNG_FILE}: no state of torch's generators: ") for text in found)


@pytest.mark.gpu
def test_the_generator_of_a_gpu(tmp_path: Path) -> None:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
        drawn = save_and_draw(tmp_path, device)
        assert restore_and_draw(tmp_path, device) == (True, drawn)
    finally:
        dist.destroy_process_group()
