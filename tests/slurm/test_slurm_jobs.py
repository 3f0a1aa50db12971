"""The scripts of launch/slurm on a real SLURM of two nodes: completion, refusal, and every way in which a job is ended and goes on."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import Job, ask

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

Submit = Callable[..., Job]
FOR_EVER = ["train.steps=1000000", "checkpoint.every=5"]


def test_two_nodes_train_to_the_last_step(submit: Submit, words: list[str], tmp_path: Path) -> None:
    job = submit(["--nodes=2"], [*words, f"run.dir={tmp_path / 'run'}"], ranks=1)
    assert job.wait_for_end() == "COMPLETED", job.log
    assert job.steps == [1, 2, 3, 4, 5, 6]
    assert "2 rank(s) on cpu" in job.log
    (start,) = job.starts
    assert (start["job"], start["nodes"], start["log"]) == (job.number, "node-a,node-b", str(job.log_file))


def test_an_impossible_layout_ends_the_job_before_any_step(submit: Submit, words: list[str], tmp_path: Path) -> None:
    job = submit([], [*words, f"run.dir={tmp_path / 'run'}", "parallel.cp=4"], ranks=2)
    assert job.wait_for_end() == "FAILED"
    assert job.facts["ExitCode"] == "2:0"
    assert "error: layout on 2 ranks: 1 problem(s)\n  world size=2: with dp_replicate*tp*pp*cp=4" in job.log
    assert job.facts["Restarts"] == "0"
    assert not job.folder.exists()


def test_a_run_that_could_not_be_found_again_is_refused(submit: Submit, words: list[str]) -> None:
    job = submit([], [*words, "run.dir=null"], ranks=2)
    assert job.wait_for_end() == "FAILED"
    assert "error: run.dir is not set: a requeued job could not find its checkpoints" in job.log


def test_a_job_goes_on_after_whatever_ends_it(submit: Submit, words: list[str], tmp_path: Path) -> None:
    run = [*words, *FOR_EVER, f"run.dir={tmp_path / 'run'}"]
    job = submit(["--time=60", "--signal=B:USR1@110"], run, ranks=2)

    job.wait_for_steps(12)
    ask(
        "srun",
        f"--jobid={job.number}",
        "--overlap",
        "--nodes=1",
        "--ntasks=1",
        "pkill",
        "-USR1",
        "-f",
        "[-]u launch/pretrain.py",
    )
    job.wait("save on request", lambda: "as a signal asks" in job.log)

    ask("scontrol", "requeue", job.number)  # an administrator, or a job that goes before
    saved = job.wait_to_go_on(2)
    assert re.search(rf"stopped by .* at step {saved};", job.log), job.log
    assert job.facts["Restarts"] == "1"

    job.wait_for_steps(7)
    elapsed = ask("squeue", "--noheader", f"--jobs={job.number}", "--format=%M").strip()
    minutes = int(elapsed.split(":")[-2]) + 2
    ask("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes}")  # one or two minutes are left
    job.wait("requeue", lambda: job.facts["Restarts"] == "2")
    ask("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    asked = job.wait_to_go_on(3)
    assert "time is nearly up" in job.log
    assert re.search(rf"stopped by .* at step {asked};", job.log), job.log
    assert asked > saved

    job.wait_for_steps(7)
    steps = ask("squeue", "--steps", "--noheader", f"--jobs={job.number}", "--format=%i").split()
    (ranks,) = [step for step in steps if step.rpartition(".")[2].isdigit()]
    ask("scancel", "--signal=KILL", ranks)  # as where a node has no memory left
    saved = job.wait_to_go_on(4)
    assert "the step was killed (status 137): requeued" in job.log
    assert saved % 5 == 0
    assert saved > asked

    job.wait_for_steps(7)
    ask("scancel", "--signal=KILL", "--full", job.number)  # the script, too: nothing is left that could requeue
    assert job.wait_for_end() != "COMPLETED"
    saved = job.saved[-1]
    again = submit([], [*run, f"train.steps={saved + 3}"], ranks=2)
    assert again.wait_for_end() == "COMPLETED", again.log
    assert f"resumed at step {saved}" in again.log
    assert again.steps == list(range(1, saved + 4))
    assert [start["job"] for start in again.starts] == [job.number] * 4 + [again.number]


def test_a_task_of_a_sweep_is_requeued_alone(submit: Submit, words: list[str], tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("model.router.name=topk\nmodel.router.name=recurrent\n")
    words = [word for word in words if not word.startswith("model.router.")]
    sweep = submit(
        ["--array=0-1"], [str(lines), str(tmp_path / "sweep"), *words, *FOR_EVER], ranks=1, script="sweep.sbatch", log="%A_%a"
    )
    tasks = [
        Job(f"{sweep.number}_{i}", tmp_path / f"slurm-{sweep.number}_{i}.out", tmp_path / "sweep" / str(i)) for i in (0, 1)
    ]
    for task in tasks:
        task.wait_for_steps(7)
    (leader,) = [task for task in tasks if task.starts[0]["job"] == sweep.number]  # its number is also that of the whole array
    (other,) = [task for task in tasks if task is not leader]
    ask("scancel", "--batch", "--signal=USR1", leader.number)  # what SLURM sends before the time limit
    saved = leader.wait_to_go_on(2)
    assert re.search(rf"stopped by .* at step {saved};", leader.log), leader.log
    assert leader.facts["Restarts"] == "1"
    assert (other.facts["JobState"], other.facts["Restarts"], len(other.starts)) == ("RUNNING", "0", 1)
    ask("scancel", other.number)
    assert other.wait_for_end() == "CANCELLED"
    assert re.search(rf"stopped by .* at step {other.saved[-1]};", other.log), other.log
    assert (other.facts["Restarts"], other.steps[-1]) == ("0", other.saved[-1])
    for i, name in enumerate(("topk", "recurrent")):
        assert f"name: {name}" in (tmp_path / "sweep" / str(i) / "config.yaml").read_text()
