"""Measure a trained model: `python launch/evaluate.py RUN_OR_CHECKPOINT --data WHAT... | --tasks NAME... [section.key=value ...]`.

--data: bits per byte and character, perplexity per token and word. WHAT is a prepared corpus (PREFIX of PREFIX.bin and PREFIX.idx), or
a text file, JSON lines, either with .gz or .zst, or a folder of them, which are encoded first. --tasks: tasks of lm-eval-harness
(package lm_eval), or `rmoe`, the RMoE paper's five. A JSON line is printed for each WHAT, and one for all tasks; docs/evaluation.md
has the rules.
"""

import json
import logging
import sys
import tempfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_train.cli import main
from moe_train.errors import UserError

if TYPE_CHECKING:
    from moe_train.evaluate import Restored


def run(words: list[str]) -> None:
    """Evaluate as `words` say; rank 0 prints the figures."""
    given = read(words)
    local = dict(_local(word) for word in given.task_data)
    tasks: list[Any] = []
    if given.tasks:
        from moe_train.evaluate.tasks import find_tasks

        tasks = find_tasks(given.tasks, given.include, local)  # what is missing is said before a model is read

    from moe_train.evaluate import restore

    # Every task has rows of many lengths, and compiling for each costs more than it could save.
    restored = restore(given.model, ["train.compile=false"] * bool(tasks) + given.overrides)
    texts = _texts(restored, given)
    scored = {"tasks": _tasks(restored, tasks, given)} if tasks else {}
    if restored.world.main and given.json is not None:
        _write(given.json, {**_model(restored), "data": texts, **scored})


def read(words: list[str]) -> Namespace:
    """The command line."""
    parser = ArgumentParser("launch/evaluate.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="run folder or checkpoint")
    parser.add_argument("--data", nargs="+", default=[], metavar="WHAT", help="prefixes of prepared corpora, files, folders")
    parser.add_argument(
        "--stride", type=int, help="tokens that a row predicts, from what is before them in it (default: all of a row's)"
    )
    parser.add_argument(
        "--memory",
        type=int,
        help="hidden rows of each layer that a row sees of the rows before (default: the run's train.memory; 0 with --stride)",
    )
    parser.add_argument("--field", default="text", help="the text of a JSON line (default: text)")
    parser.add_argument("--label-field", help="what labels the document of a JSON line; figures are given for each label, too")
    parser.add_argument("--lines", action="store_true", help="each line of a text file is a document")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="tasks, groups or tags of lm-eval, or rmoe")
    parser.add_argument("--include", type=Path, metavar="FOLDER", help="folder with task files (YAML) beside lm-eval's own")
    parser.add_argument(
        "--task-data",
        action="append",
        default=[],
        metavar="TASK=FILE",
        help="JSON lines, CSV or parquet instead of a task's data set; may be repeated",
    )
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question (default: the task's own)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N documents of each task")
    parser.add_argument("--batch-size", type=int, metavar="N", help="rows of a task at once (default: train.micro_batch_size)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write everything to this file, too")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    given = parser.parse_intermixed_args(words)
    for name in ("data", "tasks"):  # overrides may come last, where they look like one more of these
        values = getattr(given, name)
        given.overrides += [word for word in values if "=" in word]
        setattr(given, name, [word for word in values if "=" not in word])
    if not given.data and not given.tasks:
        parser.error("give --data, --tasks or both")
    if given.memory is not None and given.memory < 0:
        parser.error("--memory must not be negative")
    for name in ("limit", "batch_size"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return given


def _local(word: str) -> tuple[str, Path]:
    task, equals, file = word.partition("=")
    if not (task and equals and file):
        raise UserError(f"--task-data={word}: not understood; give TASK=FILE")
    return task, Path(file)


def _model(restored: "Restored") -> dict[str, Any]:
    return {"checkpoint": str(restored.path), "step": restored.step}


def _texts(restored: "Restored", given: Namespace) -> list[dict[str, Any]]:
    """Figures of each text, printed as they come."""
    from moe_train.evaluate.text import Reading, evaluate_text

    own = 0 if given.stride else restored.config.train.memory
    reading = Reading(given.stride, own if given.memory is None else given.memory, given.field, given.label_field, given.lines)
    leaks, rows = restored.config.model.leaks(), []
    for data in given.data:
        with tempfile.TemporaryDirectory() as scratch:
            row = {**_model(restored), "data": data, **evaluate_text(restored, data, reading, Path(scratch))}
        rows.append({**row, "leaks": leaks} if leaks else row)
        if restored.world.main:
            for leak in leaks:
                logging.getLogger(__name__).warning("not a causal model, so that these are no likelihoods: %s", leak)
            print(json.dumps(rows[-1]), flush=True)
    return rows


def _tasks(restored: "Restored", tasks: list[Any], given: Namespace) -> dict[str, Any]:
    """Figures of all tasks, printed by rank 0."""
    from moe_train.evaluate.harness import harness_model
    from moe_train.evaluate.tasks import run_tasks

    model = harness_model(restored, given.batch_size or restored.config.train.micro_batch_size)
    found = run_tasks(model, tasks, given.num_fewshot, given.limit)
    if restored.world.main:
        print(json.dumps({**_model(restored), "tasks": found}), flush=True)
    return found


def _write(path: Path, content: dict[str, Any]) -> None:
    from moe_train.files import cannot_write, write_atomically

    try:
        write_atomically(path, json.dumps(content, indent=2).encode() + b"\n")
    except OSError as error:
        raise cannot_write(path, error) from None


if __name__ == "__main__":
    main(run, sys.argv[1:])
