"""What gets a copy of a run's figures: the interface, by a class of the user's, and Weights & Biases offline."""

import importlib.util
import json
import os
import pathlib
import signal
import struct
import subprocess
import sys

import pytest
import smallest

from lfjax import cli, trackers
from lfjax.config import InputError

MINE = """
import json
import os
import signal
from lfjax.trackers import Tracker

class Mine(Tracker):
    def write(self, *row):
        with open(self.workdir / "mine.jsonl", "a") as file:
            file.write(json.dumps(row) + "\\n")

    def cut(self, stage, step, dropped):
        self.write("cut", stage, step, list(dropped))

    def metrics(self, stage, step, figures):
        self.write("metrics", stage, step, dict(figures))

    def timing(self, stage, step, figures):
        self.write("timing", stage, step, dict(figures))

    def samples(self, stage, step, rows):
        self.write("samples", stage, step, list(rows))

    def summary(self, figures):
        self.write("summary", figures, self.config["seed"])

    def close(self, *, finished):
        self.write("close", finished)

class Killing(Tracker):
    def metrics(self, stage, step, figures):
        if step == 4 and not (self.workdir / "killed").exists():
            (self.workdir / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

class Failing(Tracker):
    def __init__(self, workdir, config):
        raise ConnectionError("nobody answers")
"""
ROOT = pathlib.Path(__file__).parents[1]
NO_WANDB = importlib.util.find_spec("wandb") is None


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """The smallest chain of two stages, in a folder with trackers of the user's own."""
    (tmp_path / "mytrackers.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mytrackers", raising=False)
    records = smallest.write_records(tmp_path / "rated.jsonl")
    given = ["--config.stages=tokenizer,pretrain", "--config.pretrain.steps=4", f"--config.data.path={records}"]
    return ["train", f"--config={smallest.PATH}", f"--workdir={tmp_path / 'w'}", *given]


def test_a_tracker_of_the_users_own_gets_what_the_log_gets(arguments, tmp_path):
    mine = "--config.run.trackers=mytrackers:Mine"
    assert cli.main([*arguments, mine]) == 0
    rows = [json.loads(line) for line in (tmp_path / "w" / "mine.jsonl").read_text().splitlines()]
    assert rows[1] == ["cut", "pretrain", -1, ["pretrain"]] and rows[-1] == ["close", True]
    logged = [json.loads(line) for line in (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()]
    assert [{"stage": row[1], "step": row[2], **row[3]} for row in rows if row[0] == "metrics"] == logged
    assert [row[2] for row in rows if row[0] == "timing"] == [3, 4]
    given = {name: value for row in rows if row[0] == "summary" for name, value in row[1].items()}
    assert given == json.loads((tmp_path / "w" / "summary.json").read_text())
    assert (tmp_path / "w" / "steps" / "Mine_tracker.py").read_text() == MINE
    assert cli.main([*arguments, "--config.run.trackers="]) == 0  # which ones may change


def test_a_tracker_that_cannot_start_ends_the_run_before_it_trains(arguments, tmp_path, capsys):
    assert cli.main([*arguments, "--config.run.trackers=mytrackers:Failing"]) == 2
    assert "mytrackers:Failing cannot start: ConnectionError: nobody answers" in capsys.readouterr().err
    assert not (tmp_path / "w" / "checkpoints").exists()
    assert cli.main([*arguments, "--config.run.trackers="]) == 0  # the folder is free


def test_wandb_that_is_not_installed_is_said_with_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'config\.run\.trackers: "wandb" is not installed; pip install wandb'):
        trackers.WandB.check()


def records_of(file: pathlib.Path):
    """The records of an offline run: LevelDB's log format in blocks of 32 KiB after a header of 7 bytes."""
    proto = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # the rest of a block that holds no head
            at += 2**15 - at % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, or last
            yield proto.Record.FromString(whole)
            whole = b""


def history(file: pathlib.Path) -> list[dict]:
    """The rows that were logged."""
    rows = [record.history for record in records_of(file) if record.WhichOneof("record_type") == "history"]
    keyed = [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in rows]
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in keyed]


@pytest.mark.skipif(NO_WANDB, reason="no wandb: its offline run was not tried (pip install wandb)")
def test_wandb_offline_holds_the_figures_and_a_run_that_goes_on_is_the_same_run(arguments, tmp_path):
    """In processes of their own: wandb keeps a service for the life of one, and puts a hook into sys.exit."""
    environment = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    more = ("--config.run.trackers=wandb,mytrackers:Killing", "--config.pretrain.save_every=2")
    command = [sys.executable, "-m", "lfjax", *arguments, *more]
    for code in (-signal.SIGKILL, 0):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    killed, whole = sorted((tmp_path / "w" / "wandb").glob("offline-run-*/*.wandb"))
    assert killed.name == whole.name == f"run-{(tmp_path / 'w' / 'wandb' / 'run_id').read_text()}.wandb"
    rows = [json.loads(line) for line in (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()]
    names = {f"pretrain/{name.removeprefix('pretrain/')}": name for row in rows for name in row}
    logged = [row for row in history(whole) if not any("/time/" in name for name in row)]
    assert [{names[name]: x for name, x in row.items()} | {"stage": "pretrain"} for row in logged] == rows
    axes = {r.metric.glob_name: r.metric.step_metric for r in records_of(whole) if r.HasField("metric")}
    assert axes["pretrain/*"] == "pretrain/step"
