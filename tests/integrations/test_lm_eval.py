"""Tasks of lm-eval-harness on a checkpoint: the numbers of the exported model in lm-eval's own class for transformers."""

import json
import random
import re
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from hf_models import write_checkpoint
from launches import launch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from moe_train.data.tokenizer import ByteTokenizer, Tokenizer, train_sentencepiece
from moe_train.errors import UserError
from moe_train.evaluate import restore
from moe_train.evaluate.harness import harness_model
from moe_train.evaluate.tasks import RMOE, find_tasks, run_tasks
from moe_train.hf.exporting import to_hf

pytestmark = pytest.mark.integration

WORDS = ["the", "cat", "sat", "on", "a", "mat", "naïve", "中文", "ran", "Answer"]
SEQ_LEN = 64
TASKS = {  # local tasks as lm-eval describes them
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "local_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "local_writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["t"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def sentence(draw: random.Random, count: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(count))


def write_tasks(folder: Path) -> Path:
    """The tasks, with documents of which some are longer than the model's window."""
    draw = random.Random(0)
    documents = [
        {
            "question": sentence(draw, draw.choice([1, 5, 40])),
            "choices": [" " + sentence(draw, 2) for _ in range(3)],
            "gold": i % 3,
        }
        for i in range(9)
    ]
    documents.append({"question": "ends with spaces  ", "choices": ["a", "b", "c"], "gold": 0})
    (folder / "data.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    for name, task in TASKS.items():
        source = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}},
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **source, **task}))
    return folder


class Both:
    """A checkpoint in our class, and its export in HFLM."""

    def __init__(self, folder: Path, router: dict[str, Any], tokenizer: Tokenizer) -> None:
        self.native = write_checkpoint(folder / "native", tokenizer, SEQ_LEN, router=router)
        to_hf(self.native.path, folder / "hf")
        self.ours = harness_model(restore(self.native.path), batch_size=4)
        self.theirs = HFLM(pretrained=str(folder / "hf"), dtype="float32", device="cpu", batch_size=1, trust_remote_code=True)
        self.tasks = write_tasks(folder)


@pytest.fixture(scope="module", params=["topk-sentencepiece", "recurrent-bytes"])
def both(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Both:
    if request.param == "recurrent-bytes":
        return Both(tmp_path_factory.mktemp("recurrent"), {"name": "recurrent", "router_size": 8}, ByteTokenizer())
    draw = random.Random(1)
    tokenizer = train_sentencepiece([sentence(draw, 400) for _ in range(20)], None, 330)
    return Both(tmp_path_factory.mktemp("topk"), {"name": "topk"}, tokenizer)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def test_tasks_give_the_numbers_of_the_exported_model(both: Both) -> None:
    found = run_tasks(both.ours, find_tasks(list(TASKS), both.tasks, {}), None, None)["results"]
    manager = TaskManager(include_path=str(both.tasks), include_defaults=False)
    theirs = lm_eval.simple_evaluate(both.theirs, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)["results"]
    for task, metrics in TASKS.items():
        for metric in (f"{one['metric']},none" for one in metrics["metric_list"]):
            assert found[task][metric] == pytest.approx(theirs[task][metric], rel=1e-4), (task, metric)


@pytest.mark.parametrize("both", ["recurrent-bytes"], indirect=True)
def test_the_command_prints_and_writes_tasks(both: Both, tmp_path: Path) -> None:
    words = ["--tasks", "local_choice", "--include", str(both.tasks), "--limit", "4", "--batch-size", "2"]
    done = launch("evaluate", str(both.native.path), *words, "--json", str(tmp_path / "out.json"), "train.device=cpu")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "out.json").read_text()) == {"data": [], **printed}
    assert printed["tasks"]["n-samples"]["local_choice"]["effective"] == 4
    ours = run_tasks(both.ours, find_tasks(["local_choice"], both.tasks, {}), None, 4)["results"]
    assert printed["tasks"]["results"] == ours


def test_likelihoods_are_those_of_the_exported_model(both: Both) -> None:
    draw = random.Random(2)
    long = sentence(draw, 60)
    pairs = [
        ("the cat", " sat"),
        ("", "the cat"),
        ("the ", "cat"),
        (long, " mat"),
        ("ran 中文", " mat"),
        ("the cat", "s " + "a" * 20),
    ]
    ours = both.ours.loglikelihood(requests("loglikelihood", *pairs))
    theirs = both.theirs.loglikelihood(requests("loglikelihood", *pairs))
    for (score, greedy), (their_score, their_greedy) in zip(ours, theirs, strict=True):
        assert score == pytest.approx(their_score, abs=1e-4)
        assert greedy == their_greedy
    texts = [(long,), ("x",), ("the cat sat",)]
    rolling = both.ours.loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
    assert rolling == pytest.approx(both.theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *texts)), rel=1e-5)


def test_texts_are_those_of_the_exported_model(both: Both) -> None:
    long = sentence(random.Random(3), 60)
    settings = {"until": ["\n\n", "z"], "max_gen_toks": 20, "do_sample": False}
    given = [("the cat", settings), (long, settings), ("a", {"until": [], "max_gen_toks": 5})]
    ours = both.ours.generate_until(requests("generate_until", *given))
    theirs = both.theirs.generate_until(requests("generate_until", *given))
    assert any(ours)
    if both.native.tokenizer.name == "bytes":
        assert ours == theirs
    else:
        assert all(re.fullmatch(as_transformers_shows(one), other) for one, other in zip(ours, theirs, strict=True))
    with pytest.raises(UserError, match=r"generation_kwargs.num_beams=4: is not known here"):
        both.ours.generate_until(requests("generate_until", ("a", {"num_beams": 4})))


def as_transformers_shows(text: str) -> str:
    """A pattern: of byte pieces in a row that are no UTF-8 it shows each byte as U+FFFD, and we only the wrong ones, together."""
    pieces = ("\ufffd{1,3}" if c == "\ufffd" else f"(?:{re.escape(c)}|\ufffd{{{len(c.encode())}}})" for c in text)
    return "".join(pieces)


DOCUMENTS: dict[str, dict[str, Any]] = {  # one of each data set of the RMoE paper's tasks
    "arc_easy": {
        "question": "Which is a metal?",
        "choices": {"text": ["wood", "iron", "glass", "wool"], "label": ["A", "B", "C", "D"]},
        "answerKey": "B",
    },
    "hellaswag": {
        "ctx_a": "A man sits.",
        "ctx_b": "he",
        "activity_label": "Sitting",
        "endings": ["stands up.", "is blue [title] here.", "flies.", "sinks."],
        "label": "0",
    },
    "piqa": {"goal": "Open a tin", "sol1": "use an opener", "sol2": "use a pillow", "label": 0},
    "sciq": {
        "question": "What is water?",
        "support": "Water is a liquid.",
        "distractor1": "a gas",
        "distractor2": "a metal",
        "distractor3": "a rock",
        "correct_answer": "a liquid",
    },
    "lambada_openai": {"text": "the cat sat on the mat"},
}


@pytest.mark.parametrize("both", ["recurrent-bytes"], indirect=True)
def test_the_papers_tasks_on_local_copies_of_their_data(both: Both, tmp_path: Path) -> None:
    data = {}
    for name, document in DOCUMENTS.items():
        data[name] = tmp_path / f"{name}.jsonl"
        data[name].write_text("".join(json.dumps(document) + "\n" for _ in range(2)))
    found = run_tasks(both.ours, find_tasks(["rmoe"], None, data), None, None)
    assert found["n-samples"].keys() == RMOE.keys()
    assert found["rmoe"].keys() == {*RMOE, "mean"}
    for task, metric in RMOE.items():
        assert found["rmoe"][task] == found["results"][task][metric]
    request = "Question: Which is a metal?\nAnswer:"
    choices = [(request, f" {text}") for text in DOCUMENTS["arc_easy"]["choices"]["text"]]
    scores = [score for score, _ in both.theirs.loglikelihood(requests("loglikelihood", *choices))]
    assert found["rmoe"]["arc_easy"] == float(scores.index(max(scores)) == 1)


@pytest.mark.parametrize(
    ("names", "data", "message"),
    [
        (["no_such_task"], {}, "--tasks=no_such_task: lm-eval has no such task"),
        (["sciq"], {"piqa": "x.jsonl"}, "--task-data=piqa: is not among the tasks"),
        (["sciq"], {"sciq": "gone.jsonl"}, "--task-data=sciq=.*gone.jsonl: there is no such file"),
        (["sciq"], {}, "--tasks=sciq: its data cannot be loaded .*--task-data sciq=FILE"),
    ],
    ids=["unknown task", "spare data", "no file", "offline"],
)
def test_tasks_that_cannot_be(names: list[str], data: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        find_tasks(names, None, {name: tmp_path / file for name, file in data.items()})
