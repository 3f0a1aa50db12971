"""Which SLURM job a run belongs to, kept in its folder, so that a run leads to its jobs and their logs.

`job.jsonl` holds a line for every start inside a job: time, the step it started from, and those of `VARIABLES` that are set.
Nothing else of the environment is kept.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

JOBS_FILE = "job.jsonl"
VARIABLES = {
    "job": "SLURM_JOB_ID",
    "name": "SLURM_JOB_NAME",
    "array": "SLURM_ARRAY_JOB_ID",
    "task": "SLURM_ARRAY_TASK_ID",
    "requeued": "SLURM_RESTART_COUNT",
    "restarted": "TORCHELASTIC_RESTART_COUNT",
    "partition": "SLURM_JOB_PARTITION",
    "nodes": "SLURM_JOB_NODELIST",
    "log": "SLURM_LOG",  # set by launch/slurm/pretrain.sbatch
}


def note_job(folder: Path, step: int, environment: Mapping[str, str] = os.environ) -> str:
    """Add this start, from `step`, to the run's `job.jsonl`; the line for people, empty outside of a job."""
    found = {name: environment[variable] for name, variable in VARIABLES.items() if environment.get(variable)}
    if "job" not in found:
        return ""
    row = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": step} | found
    with (folder / JOBS_FILE).open("a", encoding="utf-8") as jobs:
        jobs.write(json.dumps(row) + "\n")
    return "SLURM job: " + ", ".join(f"{name} {value}" for name, value in found.items())
