"""The documentation says what the code does: pages are what their commands write, and code in them runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_train import routers

ROOT = Path(__file__).parents[2]


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
    """The project with the tutorial's files, and its line of registration."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("moe_train", "tests", "kernels/moe_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    files = files_of(ROOT / "docs" / "your_router.md")
    assert list(files) == ["moe_train/routers/sticky.py", "tests/unit/test_sticky.py"]
    for path, text in files.items():
        assert not (folder / path).exists()
        (folder / path).write_text(text)
    ((before, after),) = re.findall(
        r"^```diff\n (.*)\n\+(.*)\n```$", (ROOT / "docs" / "your_router.md").read_text(), re.MULTILINE
    )
    registered = folder / "moe_train" / "routers" / "__init__.py"
    text = registered.read_text()
    assert text.count(f"{before}\n") == 1
    registered.write_text(text.replace(f"{before}\n", f"{before}\n{after}\n"))
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
