"""Reading runs: files, overrides, and one report of everything that is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from moe_train import config as tree
from moe_train import routers
from moe_train.cli import describe_keys, dump, load_run, parse, read_override, usage
from moe_train.config import Config, RouterConfig
from moe_train.errors import UserError
from moe_train.routers.recurrent import RecurrentConfig
from moe_train.routers.topk import TopKConfig

ROOT = Path(__file__).parents[2]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def report(content: dict) -> str:
    with pytest.raises(UserError) as caught:
        parse(content, "file.yaml")
    return str(caught.value)


def test_defaults_are_a_valid_run() -> None:
    assert isinstance(parse({}, "empty").model.router, RecurrentConfig)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.name)
def test_shipped_runs_are_valid_and_read_back(path: Path) -> None:
    config = load_run(path)
    assert parse(json.loads(config.model_dump_json()), "again") == config
    assert dump(config)


def test_extends_and_overrides(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "model: {hidden_size: 64, num_layers: 2}\ntrain: {steps: 5}\n")
    path = write(tmp_path, "run.yaml", "extends: base.yaml\nmodel: {num_layers: 3}\n")
    config = load_run(path, ["train.steps=7", "optim.lr=1e-3", "data.train=[a, b]"])
    assert (config.model.hidden_size, config.model.num_layers, config.train.steps) == (64, 3, 7)
    assert config.optim.lr == 1e-3
    assert config.data.train == ["a", "b"]


@pytest.mark.parametrize(
    ("keys", "blocks"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"moe_layer_freq": 2}, [0, 2, 4]),
        ({"moe_layer_freq": 2, "num_dense_layers": 1}, [2, 4]),
        ({"num_dense_layers": 4}, [4, 5]),
        ({"moe_layer_freq": 5}, [0, 5]),
        ({"moe_layer_freq": [0, 1, 1, 0, 0, 1]}, [1, 2, 5]),
        ({"moe_layer_freq": [1, 1, 1, 0, 0, 1], "num_dense_layers": 2}, [2, 5]),
    ],
)
def test_which_blocks_have_experts(keys: dict, blocks: list[int]) -> None:
    model = parse({"model": {"num_layers": 6, **keys}}, "test").model
    assert list(model.moe_layers) == blocks
    assert model.has_dense_layers == (len(blocks) < 6)


def test_another_router_drops_the_keys_of_the_old_one(tmp_path: Path) -> None:
    path = write(tmp_path, "run.yaml", "model: {router: {name: recurrent, router_size: 32, top_k: 3}}\n")
    assert load_run(path).model.router == RecurrentConfig(router_size=32, top_k=3)
    assert load_run(path, ["model.router.name=topk"]).model.router == TopKConfig()
    assert load_run(path, ["model.router.top_k=1", "model.router.renormalize=false"]).model.router.top_k == 1


def test_all_problems_are_in_one_report() -> None:
    text = report(
        {
            "model": {"hidden_siz": 3, "num_heads": 5, "router": {"name": "topk", "topk": 3, "top_k": 9}},
            "train": {"steps": -1, "global_batch_size": 7, "micro_batch_size": 2},
            "optm": {},
            "parallel": {"tp": 2, "expert_tp": 4, "ep": 3, "pp": 2, "sharding": "parameters", "pp_layers": [1, 2, 3]},
        }
    )
    for part in (
        "file.yaml: 14 problem(s)",
        "did you mean model.hidden_size?",
        "model.num_heads=5: must divide model.hidden_size=128; change it or set model.head_dim",
        "did you mean model.router.top_k?",
        "model.router.top_k=9: must be at most model.num_experts=8",
        "train.steps=-1: input should be greater than 0",
        "train.global_batch_size=7: must be a multiple of train.micro_batch_size=2",
        "did you mean optim?",
        "parallel.expert_tp=4: must be 1 or parallel.tp=2",
        "parallel.sharding=parameters: cannot be combined with pp",
        "parallel.pp_layers=[1, 2, 3]: must name the layers of 2 stages",
        "model.num_experts=8: must be a multiple of parallel.ep=3",
    ):
        assert part in text, text


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"model": {"router": {"name": "recurent"}}}, "did you mean 'recurrent'?"),
        ({"model": {"router": {}}}, "model.router.name=None"),
        ({"model": {"router": "topk"}}, "model.router='topk': input should be a valid dictionary"),
        ({"model": 3}, "model=3"),
        ({"steps": 3}, "did you mean train.steps?"),
        ({"model": {"top_k": 3}}, "did you mean model.router.top_k?"),
        (
            {"model": {"router": {"name": "topk", "router_size": 3}}},
            "model.router.router_size: unknown key; a key of mlp, recurrent, xmoe, and this router is topk, which has name, top_k",
        ),
        ({"data": {"train": []}}, "data.train=[]: an empty list names nothing"),
        ({"sft": {"valid": []}}, "sft.valid=[]: an empty list names nothing"),
        ({"optim": {"lr": float("nan")}}, "optim.lr=nan"),
        ({"optim": {"lr": "fast"}}, "optim.lr='fast'"),
        ({"parallel": {"dp_shard": "all"}}, "parallel.dp_shard='all'"),
        ({"model": {"router": {"name": "topk", "top_k": 1}}}, "no gradient from the task"),
        ({"model": {"num_dense_layers": 4}}, "must be below model.num_layers=4"),
        (
            {"model": {"moe_layer_freq": [1, 0]}},
            "model.moe_layer_freq=[1, 0]: must have one entry for each of model.num_layers=4",
        ),
        ({"model": {"moe_layer_freq": [0, 0, 0, 0]}}, "leaves no block with experts"),
        ({"model": {"moe_layer_freq": 4, "num_dense_layers": 1}}, "model.moe_layer_freq=4: leaves no block with experts"),
        ({"model": {"moe_layer_freq": 0}}, "model.moe_layer_freq=0"),
        ({"optim": {"lr": 1e-4, "min_lr": 3e-4}}, "optim.min_lr=0.0003: must be at most"),
        ({"kernels": {"backend": "triton"}, "train": {"device": "cpu"}}, "needs CUDA"),
        ({"run": {"dir": "a\0b"}}, "no file can have this name"),
        ({"run": {"dir": "x" * 300}}, "no file can have this name"),
        ({"data": {"train": ["ok", "x/" * 3000]}}, "no file can have this name"),
        ({"data": {"tokenizer": "\ud800"}}, "data.tokenizer="),
    ],
)
def test_problems_are_named(content: dict, part: str) -> None:
    assert part in report(content)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "holds a list"),
        ("run: {seed: 1}\nrun: {seed: 2}\n", "appears twice"),
        ("1: 2", "is not text"),
        ("extends: gone.yaml", "gone.yaml: cannot be read"),
        ("extends: 3", "must be a path"),
        ("extends: run.yaml", "extends itself"),
        ("\x00", "not valid YAML"),
        ("run: !!python/object/apply:os.system [ls]", "the tag .* is not read"),
        ("run: {seed: !!int ''}", "the tag .* is not read"),
        ("data: &a {train: *a}", "an alias may stand for a single value only"),
        ("data: &a [x]\nmodel: *a", "an alias may stand for a single value only"),
        ("[" * 5000, "levels of nesting"),
        ("run: {seed: 0x" + "f" * 5000 + "}", "does not fit 64 bits"),
        ("run: {seed: 9223372036854775808}", "does not fit 64 bits"),
        ("optim: {lr: " + ":".join(["1"] * 1000) + ".0}", "not valid YAML"),
        ('extends: "\\0"', "cannot be read"),
        ("extends: /dev/zero", "more than 262144 bytes"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, part: str) -> None:
    path = write(tmp_path, "run.yaml", text)
    with pytest.raises(UserError, match=part):
        load_run(path)


def test_values_that_other_yaml_readers_change_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path, "run.yaml", "run: {dir: 2026-01-01, seed: &s 3}\ntrain: {steps: *s}\nsample: {prompt: =}\n")
    config = load_run(path)
    assert (config.run.dir, config.train.steps, config.sample.prompt) == ("2026-01-01", 3, "=")


def test_the_number_of_files_that_extend_each_other_is_bounded(tmp_path: Path) -> None:
    for i in range(40):
        write(tmp_path, f"{i}.yaml", f"extends: [{i + 1}.yaml, {i + 1}.yaml]\n")
    write(tmp_path, "40.yaml", "")
    with pytest.raises(UserError, match="extends more than 100 files"):
        load_run(tmp_path / "0.yaml")


def test_a_report_stays_readable() -> None:
    text = report({**{f"key{i}": i for i in range(300)}, "a\nb": 1, "x" * 5000: 1})
    assert text.startswith("file.yaml: 302 problem(s)\n")
    assert text.endswith("\n  and 252 more")
    assert all(line.startswith("  ") and len(line) < 400 for line in text.split("\n")[1:])
    text = report({"a\nb": 1, "x" * 5000: 1})
    assert "'a\\nb': unknown key" in text
    assert len(text.split("\n")) == 3


def test_a_message_cannot_move_the_cursor_or_fill_the_terminal() -> None:
    assert str(UserError("\x1b[2J\r\0é\ud800\n  second\nx")) == "\\x1b[2J\\r\\x00é\\ud800\n  second\\nx"
    assert len(str(UserError("x" * 10**6))) < 1100


@pytest.mark.parametrize("word", ["steps", "=3", "a..b=1", "train.steps=[", ".".join("a" * 50_000) + "=1"])
def test_bad_overrides(word: str) -> None:
    with pytest.raises(UserError):
        read_override(word)


@pytest.mark.parametrize(
    ("parallel", "world", "part"),
    [
        ({"dp_replicate": 2}, 3, "multiple of 2"),
        ({"dp_shard": 2}, 4, "use auto"),
        ({}, 4, "times 4 data-parallel ranks"),
        ({"pp": 2}, 6, "gives 1 micro-batches to each pipeline; 1f1b needs at least pp=2"),
    ],
)
def test_layouts_that_do_not_fit(parallel: dict, world: int, part: str) -> None:
    config = parse({"parallel": parallel, "train": {"global_batch_size": 6, "micro_batch_size": 2}}, "x")
    assert part in "\n".join(map(str, config.layout_conflicts(world)))


def test_a_config_is_frozen() -> None:
    config = parse({}, "x")
    with pytest.raises(ValidationError):
        config.run.seed = 3


def test_every_key_has_a_meaning() -> None:
    assert routers.registry().keys() == RouterConfig.registry.keys()
    rows = describe_keys()
    assert {"run.dir", "model.router.name", "model.router.router_size", "parallel.dp_shard"} <= {row[0] for row in rows}
    assert not [row for row in rows if not row[3]]
    assert all(row[0] in usage("tool", "what") for row in rows)


def test_schema_covers_the_routers() -> None:
    tree.build_schema()
    text = json.dumps(Config.model_json_schema())
    assert "router_size" in text
    assert "balance_scope" in text


def run_tool(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "launch/pretrain.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_launcher_reports_on_one_line_and_exits_2() -> None:
    done = run_tool("configs/quickstart.yaml", "train.stps=3", "model.router.top_k=99")
    assert done.returncode == 2
    assert "did you mean train.steps?" in done.stderr
    assert "model.router.top_k=99" in done.stderr
    assert "Traceback" not in done.stderr


def test_print_config_is_a_run_file(tmp_path: Path) -> None:
    done = run_tool("configs/quickstart.yaml", "train.steps=3", "--print-config")
    assert done.returncode == 0, done.stderr
    assert load_run(write(tmp_path, "again.yaml", done.stdout)) == load_run(ROOT / "configs/quickstart.yaml", ["train.steps=3"])
