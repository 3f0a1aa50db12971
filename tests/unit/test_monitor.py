"""Who else hears of a run: log.txt for people, and boards as the config names them."""

import re
import sys
from pathlib import Path

import pytest

from moe_train.config.faults import MonitorSection
from moe_train.errors import UserError
from moe_train.metrics import RunLog, read_rows
from moe_train.monitor import open_boards


def test_log_txt_has_what_people_were_told_over_restarts(tmp_path: Path) -> None:
    with RunLog(tmp_path, 9, live=False) as log:
        log.say("a run\x1b[2J")
        log.train(1, {"loss": 3.5})
    with RunLog(tmp_path, 9, start_step=1, live=True) as log:  # the live line has no plain lines
        log.train(2, {"loss": 2.5})
        log.fault(3, {"cause": "nonfinite", "action": "skip", "text": "the loss is nan", "bundle": "there"})
        log.evaluation(3, "valid", {"loss": 2.25})
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  \S", line) for line in lines)
    assert [line[21:] for line in lines] == [
        r"a run\x1b[2J",
        "step 1/9  loss 3.5000",
        "step 2/9  loss 2.5000",
        "warning: step 3: the loss is nan; the step is skipped; kept in there",
        "step 3  valid  loss 2.2500 nats",
    ]
    assert read_rows(tmp_path)[2]["cause"] == "nonfinite"


def test_boards_are_those_of_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunLog(tmp_path / "none", 2, live=False, monitor=MonitorSection(tensorboard=False)) as log:
        log.train(1, {"loss": 3.5})
        log.sync()
    assert not (tmp_path / "none" / "tensorboard").exists()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"monitor.wandb: wandb is not installed; pip install 'moe_train\[wandb\]'"):
        open_boards(MonitorSection(tensorboard=False, wandb="offline"), tmp_path, 0)
