"""Who may import whom, and what stays optional."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {  # part of moe_train -> the parts that it may import; every part may import errors, files and patience
    "errors": set(),
    "files": set(),
    "patience": set(),
    "config": set(),
    "agent": set(),
    "cli": {"agent", "config", "routers", "yaml_text"},
    "yaml_text": set(),
    "model": {"config"},
    "routers": {"model", "config"},
    "parallel": {"agent", "model", "config", "flops"},
    "data": set(),
    "optim": {"config", "model"},
    "checkpoint": set(),
    "engine": {"parallel", "optim", "model", "config", "data"},
    "flops": {"config", "model"},
    "metrics": {"config", "flops", "monitor", "screen"},
    "screen": set(),
    "monitor": {"config"},
    "faults": {"checkpoint", "cli", "config", "data", "engine", "evaluate", "model", "parallel"},
    "doctor": {"cli", "config", "data", "flops", "model", "parallel", "pretraining"},
    "plots": {"metrics"},
    "startup": set(),
    "jobs": set(),
    "stop": set(),
    "ranks": set(),
    "verify": {"cli", "config", "data", "engine", "parallel", "pretraining", "ranks"},
    "generate": {"config", "data", "model"},
    "rivals": {"config", "data", "optim", "parallel"},
    "hf": {"checkpoint", "cli", "config", "data", "evaluate", "flops", "model", "parallel", "routers"},
    "upcycle": {"checkpoint", "cli", "config", "evaluate", "hf", "model"},
    "feed": {"config", "data", "engine", "parallel"},
    "pretraining": {"config", "data", "evaluate", "feed", "parallel"},
    "transfer": {"checkpoint", "config", "engine"},
    "finetune": {"checkpoint", "cli", "config", "data", "engine", "evaluate", "feed", "parallel", "train"},
    "evaluate": {"checkpoint", "cli", "config", "data", "engine", "generate", "model", "parallel"},
}
TEMPLATE = Path("hf", "modeling.py")  # imported by nobody: it is a part of what is written for transformers
SLOW = (
    "matplotlib",
    "tensorboard",
    "torch.utils.tensorboard",
    "moe_train.plots",
)  # that a start, or start again, must not wait for
OPTIONAL = {"deepspeed", "megablocks", "flash_attn", "transformers", "lm_eval", "triton", "wandb"}


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, whether at the top level) of every import in a file."""
    module = ast.parse(path.read_text())
    top = {id(node) for node in module.body}
    found = []
    for node in ast.walk(module):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        if isinstance(node, ast.ImportFrom) and node.module == "moe_train":
            names = [f"moe_train.{a.name}" for a in node.names]
        found += [(name, id(node) in top) for name in names]
    return found


def files() -> list[Path]:
    return sorted((ROOT / "moe_train").rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_layers(path: Path) -> None:
    part = path.relative_to(ROOT / "moe_train").parts[0].removesuffix(".py")
    used = {name.split(".")[1] for name, _ in imports(path) if name.startswith("moe_train.")}
    if part in MAY_IMPORT:
        assert used <= MAY_IMPORT[part] | {part, "errors", "files", "patience"}
    optional = [name for name, top in imports(path) if top and name.split(".")[0] in OPTIONAL]
    assert not optional or path.relative_to(ROOT / "moe_train") == TEMPLATE


def test_a_start_does_not_wait_for_plots_and_boards() -> None:
    slow = [(path.name, name) for path in files() for name, top in imports(path) if top and name.startswith(SLOW)]
    assert slow
    assert {file for file, _ in slow} == {"plots.py"}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "kernels" / "moe_kernels").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_kernels_know_tensors_only(path: Path) -> None:
    assert not [name for name, _ in imports(path) if name.startswith("moe_train")]


def test_kernels_folder_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would shadow the PyPI package called `kernels`


def test_setup_imports_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--name']; exec(open('setup.py').read())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "moe_train"


def test_a_wheel_has_every_file_of_the_packages_and_the_commands(tmp_path: Path) -> None:
    built = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    done = subprocess.run(built, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    places = {"moe_train": "moe_train", "moe_kernels": "kernels/moe_kernels", "moe_train/launch": "launch"}
    ours = {f"{name}/{p.relative_to(ROOT / place)}" for name, place in places.items() for p in (ROOT / place).rglob("*.py")}
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.py")} == ours
    assert "moe_train/launch/pretrain.py" in ours
