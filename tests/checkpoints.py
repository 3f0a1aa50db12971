"""Checkpoints that somebody changed on purpose."""

import hashlib
import json
from pathlib import Path
from typing import Any


def reseal(folder: Path, edit: Any = lambda state: state) -> None:
    """Write a state.json that agrees with the files in `folder`, after `edit` of its content: what a forger would do."""
    path = folder / "state.json"
    state = json.loads(path.read_text())
    state.pop("sha256", None)
    state["files"] = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in folder.iterdir()
        if file.is_file() and file != path
    }
    state = edit(state)
    seal = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**state, "sha256": seal} if isinstance(state, dict) else state))
