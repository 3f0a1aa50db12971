"""What a run keeps of the SLURM job that it belongs to."""

import json
from pathlib import Path

from moe_train import routers
from moe_train.jobs import note_job

ROOT = Path(__file__).parents[2]


def test_each_start_is_a_line_with_the_log(tmp_path: Path) -> None:
    job = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "gpu[1-2]", "SLURM_LOG": "/logs/slurm-12.out"}
    told = note_job(tmp_path, 0, job)
    assert told == "SLURM job: job 12, nodes gpu[1-2], log /logs/slurm-12.out"
    note_job(tmp_path, 40, job | {"SLURM_RESTART_COUNT": "1"})
    first, second = map(json.loads, (tmp_path / "job.jsonl").read_text().splitlines())
    assert (first["job"], first["step"], first["log"]) == ("12", 0, "/logs/slurm-12.out")
    assert (second["step"], second["requeued"]) == (40, "1")


def test_nothing_else_of_the_environment_is_kept(tmp_path: Path) -> None:
    note_job(tmp_path, 0, {"SLURM_JOB_ID": "12", "API_TOKEN": "secret", "SLURM_JWT": "secret"})
    assert "secret" not in (tmp_path / "job.jsonl").read_text()


def test_outside_of_a_job_there_is_no_file(tmp_path: Path) -> None:
    assert note_job(tmp_path, 0, {"API_TOKEN": "secret"}) == ""
    assert not list(tmp_path.iterdir())


def test_the_sweep_of_routers_has_all_of_them() -> None:
    folder = ROOT / "launch" / "slurm"
    lines = (folder / "routers.txt").read_text().splitlines()
    assert sorted(lines) == [f"model.router.name={name}" for name in sorted(routers.registry())]
    assert f"--array=0-{len(lines) - 1}%" in (folder / "sweep.sbatch").read_text()
