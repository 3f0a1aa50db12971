"""The documentation says what the code does: pages are what their commands write, and code in them runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_train import routers
from moe_train.cli import load_run
from moe_train.config.layout import check_layout
from moe_train.verify import lay_out

ROOT = Path(__file__).parents[2]
TUTORIAL = {"model.router.name=sticky"}  # a router that is there only for those who have read the page


def python(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=280, env=environment)


def test_the_routers_page_is_what_its_command_writes() -> None:
    done = python("docs/make_routers.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (ROOT / "docs" / "routers.md").read_text(), "docs/routers.md is old: run `make docs`"


@pytest.mark.parametrize("name", sorted(routers.registry()))
def test_a_router_documents_itself(name: str) -> None:
    text = sys.modules[routers.registry()[name].__module__].__doc__ or ""
    assert all(word in text for word in ("arXiv", "State:", "Cost", "Traps:")), "see CONTRIBUTING.md, A new router"


def files_of(page: Path) -> dict[str, str]:
    """Path -> text of the Python files in a page: its code blocks that begin with their path."""
    return dict(re.findall(r"^```python\n# (\S+)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with the tutorial's files."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("moe_train", "tests", "kernels/moe_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    files = files_of(ROOT / "docs" / "your_router.md")
    assert list(files) == ["moe_train/routers/sticky.py", "tests/unit/test_sticky.py"]
    for path, text in files.items():
        assert not (folder / path).exists()
        (folder / path).write_text(text)
    return folder


def test_the_tutorials_router_passes_its_own_tests(copy: Path) -> None:
    done = python("-m", "pytest", "tests/unit/test_sticky.py", "-p", "no:cacheprovider", cwd=copy)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_tutorials_code_has_the_projects_style(copy: Path) -> None:
    for words in (["check"], ["format", "--check"]):
        done = python("-m", "ruff", *words, *files_of(ROOT / "docs" / "your_router.md"), cwd=copy)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_tutorials_router_passes_what_every_router_must(copy: Path) -> None:
    done = python("-m", "pytest", "tests/unit/test_every_router.py", "-k", "sticky", "-p", "no:cacheprovider", cwd=copy)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d\d passed", done.stdout) or re.search(r"^\.{10}", done.stdout, re.MULTILINE), done.stdout


def commands() -> list[tuple[str, str, str, list[str]]]:
    """(ranks, command, run file, words) of each line in the documentation that starts a run of ours on a file of ours."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text().replace("\\\n", " ") for page in pages if page.name != "experiments.md")
    pattern = r"^(.*)\blaunch/(pretrain|benchmark|doctor|verify)\.py (configs/\S+\.yaml)([^#`\n]*)"
    found = []
    for before, command, file, after in re.findall(pattern, text, re.MULTILINE):
        ranks = re.search(r"(?:--nproc-per-node|WORLD_SIZE)[= ](\d+)", before)
        found.append((ranks[1] if ranks else "1", command, file, [w for w in after.split() if "=" in w and w[0] != "-"]))
    return found


@pytest.mark.parametrize(("ranks", "command", "file", "words"), commands(), ids=lambda part: str(part))
def test_a_command_of_the_documentation_is_a_run_that_can_start(ranks: str, command: str, file: str, words: list[str]) -> None:
    layouts = [w for w in words if command == "verify" and "." not in w.partition("=")[0]]
    config = load_run(ROOT / file, [w for w in words if w not in layouts and w not in TUTORIAL])
    if command != "doctor" and not layouts:
        check_layout(config, int(ranks))
    for layout in layouts:
        lay_out(config, layout)


def test_the_documentation_has_commands() -> None:
    assert {"pretrain", "benchmark", "doctor", "verify"} == {command for _, command, _, _ in commands()}
    assert {"1", "2", "4", "8"} <= {ranks for ranks, _, _, _ in commands()}
