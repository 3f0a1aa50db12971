"""Tasks of lm-eval-harness on a model, and the numbers of them that papers report."""

from pathlib import Path
from typing import Any

from moe_train.errors import UserError
from moe_train.evaluate.harness import require_lm_eval

# The RMoE paper's five tasks (arXiv 2408.06793) with the metric of each.
RMOE = {
    "arc_easy": "acc,none",
    "hellaswag": "acc_norm,none",
    "piqa": "acc_norm,none",
    "sciq": "acc,none",
    "lambada_openai": "acc,none",
}
SETS = {"rmoe": RMOE}
_RESAMPLES = 1000  # for the error bars of metrics that are no means


def find_tasks(names: list[str], include: Path | None, data: dict[str, Path]) -> list[Any]:
    """Tasks, groups and tags by name, those of folder `include` too; with `data` a task reads a local file instead of its data set.

    Raises UserError for names that are not known, and for data that cannot be had.
    """
    require_lm_eval()
    names = list(dict.fromkeys(task for name in names for task in SETS.get(name, {name: ""})))
    if spare := [name for name in data if name not in names]:
        raise UserError(f"--task-data={spare[0]}: is not among the tasks to run; add it to --tasks")
    if gone := [name for name, file in data.items() if not file.is_file()]:
        remedy = "give JSON lines with the fields of the task's data set"
        raise UserError(f"--task-data={gone[0]}={data[gone[0]]}: there is no such file; {remedy}")
    manager = _manager(names, include)
    found: list[Any] = []
    for name in names:
        try:
            loaded = manager.load([_local(name, data[name]) if name in data else name])
        except Exception as error:  # data sets come from anywhere, and so do their errors
            problem = " ".join(str(error).split())[:300]
            remedy = f"give a local copy with --task-data {name}=FILE, or a task of your own with --include FOLDER"
            raise UserError(f"--tasks={name}: its data cannot be loaded ({problem}); {remedy}") from None
        found += loaded["tasks"].values() if name in data else loaded.get("groups", {}).values() or loaded["tasks"].values()
    return found


def _manager(names: list[str], include: Path | None) -> Any:
    """What knows these tasks: lm-eval's own, of which there are thousands, are read where `include` has not all of them."""
    from lm_eval.tasks import TaskManager

    if include is not None and not include.is_dir():
        raise UserError(f"--include={include}: is no folder; give one with task files (YAML)")
    folder = None if include is None else str(include)
    if folder is not None:
        manager = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=folder)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise UserError(
            f"--tasks={unknown[0]}: lm-eval has no such task; `lm-eval ls tasks` lists them, --include adds a folder"
        )
    return manager


def _local(name: str, file: Path) -> dict[str, Any]:
    """A group of one: the task, with all of its settings but where documents come from."""
    kind = {".parquet": "parquet", ".csv": "csv"}.get(file.suffix, "json")
    splits = {"test_split": "test", "validation_split": None, "training_split": None, "fewshot_split": None}
    source = {"dataset_path": kind, "dataset_name": None, "dataset_kwargs": {"data_files": {"test": str(file.absolute())}}}
    return {"group": f"{name} on {file.name}", "task": [{"task": name, **source, **splits}]}


def run_tasks(model: Any, tasks: list[Any], shots: int | None, limit: int | None) -> dict[str, Any]:
    """Every metric of tasks by lm-eval, and of the sets that are complete the paper's numbers and their mean."""
    import lm_eval

    done = lm_eval.simple_evaluate(
        model, tasks=tasks, num_fewshot=shots, limit=limit, bootstrap_iters=_RESAMPLES, log_samples=False
    )
    results = {name: _plain(row) for name, row in done["results"].items()}
    return {
        "lm_eval": lm_eval.__version__,
        "results": results,
        "versions": done["versions"],
        "n-shot": done["n-shot"],
        "n-samples": done["n-samples"],
        **{name: summary for name, metrics in SETS.items() if (summary := summarise(results, metrics))},
    }


def summarise(results: dict[str, dict[str, Any]], metrics: dict[str, str]) -> dict[str, float]:
    """The metric that counts of each task of a set, and the mean of them; nothing unless all tasks are there."""
    if not all(metric in results.get(task, {}) for task, metric in metrics.items()):
        return {}
    found = {task: float(results[task][metric]) for task, metric in metrics.items()}
    return {**found, "mean": sum(found.values()) / len(found)}


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if isinstance(value, int | float)}
