import io
import json
import os
import resource
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from lfjax.config import InputError
from lfjax.metrics import Progress, RunLog, Window, read_json, write_json
from lfjax.trackers import TensorBoard
from lfjax.types import Mean

STAGES = ("pretrain", "reward", "ppo")


def mean(total, weight):
    return Mean(jnp.float32(total), jnp.float32(weight))


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# Window


def test_a_window_weighs_every_step_by_its_weight():
    window = Window()
    window.add({"a": mean(10.0, 4.0), "b": mean(1.0, 1.0)})
    window.add({"a": mean(2.0, 1.0)})
    assert window.fetch() == {"a": 12.0 / 5.0, "b": 1.0}
    assert window.fetch() == {}


def test_a_window_adds_in_float64():
    window = Window()
    window.add({"a": mean(2.0**24, 1.0)})
    window.add({"a": mean(1.0, 0.0)})
    assert window.fetch()["a"] == 2.0**24 + 1  # float32 would lose the 1


def test_what_never_counted_is_absent():
    """As the squared error in a run that nothing was rated in."""
    window = Window()
    window.add({"a": mean(0.0, 0.0), "b": mean(0.0, 2.0)})
    assert window.fetch() == {"b": 0.0}


def test_adding_does_not_wait_for_the_device():
    """The loop may run ahead: nothing is transferred before fetch, whatever the number of steps."""
    window = Window()
    with jax.transfer_guard("disallow"):
        for metrics in [{"a": Mean(x, x)} for x in WAITING]:
            window.add(metrics)
    assert window.fetch() == {"a": 1.0}


WAITING = [jnp.float32(x) for x in (1.0, 2.0, 3.0)]


def test_stopping_inside_an_interval_changes_no_bit():
    values = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    steps = [{"a": mean(total, abs(weight)), "b": mean(weight, 1.0)} for total, weight in values]
    straight = Window()
    for step in steps:
        straight.add(step)
    for stop in (1, 7, 19):
        before = Window()
        for step in steps[:stop]:
            before.add(step)
        saved = json.dumps(before.pending())
        after = Window()
        after.restore(json.loads(saved))
        for step in steps[stop:]:
            before.add(step)  # and the one that saved goes on as if it had not
            after.add(step)
        expected = straight.pending()
        assert before.pending() == expected
        assert after.pending() == expected


# RunLog


def test_equal_floats_give_equal_text_and_come_back_with_every_bit(tmp_path):
    log = RunLog(tmp_path)
    values = [0.1, 1 / 3, np.float64(1 / 3), float(np.float32(0.1)), 1e-300, 5e-324, -0.0]
    log.metrics("ppo", 1, {f"v{i}": value for i, value in enumerate(values)})
    (row,) = rows(tmp_path / "metrics.jsonl")
    for i, value in enumerate(values):
        assert struct.pack("d", row[f"v{i}"]) == struct.pack("d", float(value))
    first = (tmp_path / "metrics.jsonl").read_bytes()
    log.metrics("ppo", 1, {f"v{i}": value for i, value in reversed(list(enumerate(values)))})
    assert (tmp_path / "metrics.jsonl").read_bytes() == first * 2  # the order of the dict does not matter either


def test_rows_carry_stage_and_step_and_no_clock(tmp_path):
    log = RunLog(tmp_path)
    log.metrics("pretrain", 10, {"pretrain/loss": 4.0})
    log.timing("pretrain", 10, seconds=1.5, tokens_per_s=1000.0)
    log.samples("ppo", 5, [{"prompt": "a\nb", "response": "ü \u2028", "set": "after"}])
    assert rows(tmp_path / "metrics.jsonl") == [{"stage": "pretrain", "step": 10, "pretrain/loss": 4.0}]
    assert rows(tmp_path / "timing.jsonl") == [
        {"stage": "pretrain", "step": 10, "seconds": 1.5, "tokens_per_s": 1000.0}
    ]
    text = (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    assert json.loads(text) == {"stage": "ppo", "step": 5, "prompt": "a\nb", "response": "ü \u2028", "set": "after"}
    assert text.count("\n") == 1


def test_a_figure_that_is_not_finite_is_null_and_the_row_stays_json(tmp_path):
    RunLog(tmp_path).metrics("ppo", 1, {"a": float("nan"), "b": np.float32(np.inf), "c": 1.0})
    assert rows(tmp_path / "metrics.jsonl") == [{"stage": "ppo", "step": 1, "a": None, "b": None, "c": 1.0}]


def test_other_processes_write_nothing(tmp_path):
    log = RunLog(tmp_path, process=1)
    log.metrics("ppo", 1, {"a": 1.0})
    log.samples("ppo", 1, [{"prompt": ""}])
    log.summary({"a": 1.0})
    log.cut(STAGES, "ppo", 0)
    log.close()
    assert list(tmp_path.iterdir()) == []


def write_run(log, until_stage="ppo", until_step=30):
    for stage in STAGES:
        for step in (0, 10, 20, 30):
            if stage == until_stage and step > until_step:
                break
            log.metrics(stage, step, {f"{stage}/loss": 1.0 / (step + 3)})
            log.timing(stage, step, seconds=0.5)
            log.samples(stage, step, [{"prompt": "p", "response": f"{stage} {step}"}] * 2)
        if stage == until_stage:
            break


@pytest.mark.parametrize(
    "stage, step", [("pretrain", 10), ("reward", 0), ("reward", 25), ("ppo", 30), ("pretrain", -1)]
)
def test_cut_leaves_what_a_run_stopped_there_had_written(tmp_path, stage, step):
    whole, stopped = RunLog(tmp_path / "whole"), RunLog(tmp_path / "stopped")
    write_run(whole)
    write_run(stopped, stage, step)
    whole.cut(STAGES, stage, step)
    for name in ("metrics.jsonl", "timing.jsonl", "samples.jsonl"):
        kept, expected = tmp_path / "whole" / name, tmp_path / "stopped" / name
        assert kept.read_bytes() == (expected.read_bytes() if expected.exists() else b"")


@pytest.mark.parametrize(
    "torn", [b'{"stage": "ppo", "st', b'{"stage": "ppo", "step": 20, "a": 1.0}', b"\xff\x00", b"{}"]
)
def test_cut_drops_a_torn_last_line(tmp_path, torn):
    """A line without its line feed was being written when the kill came, even if it happens to parse."""
    log = RunLog(tmp_path)
    write_run(log)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    log.cut(STAGES, "ppo", 30)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    log = RunLog(tmp_path)
    write_run(log)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join([*lines[:2], "{oops\n", *lines[2:]]))
    with pytest.raises(InputError, match=r"metrics\.jsonl:3: "):
        log.cut(STAGES, "ppo", 30)


def test_cut_on_a_fresh_workdir_is_nothing(tmp_path):
    RunLog(tmp_path).cut(STAGES, "pretrain", -1)
    assert list(tmp_path.iterdir()) == []


def test_summary_is_flat_sorted_and_grows(tmp_path):
    log = RunLog(tmp_path)
    log.summary({"ppo/kl": 9.5, "time/total_s": 12})
    log.summary({"compile/count": 7, "ppo/kl": 10.0, "pretrain/loss": np.float32(2.5)})
    text = (tmp_path / "summary.json").read_text()
    assert list(json.loads(text).items()) == [
        ("compile/count", 7),
        ("ppo/kl", 10.0),
        ("pretrain/loss", 2.5),
        ("time/total_s", 12),
    ]


def test_tensorboard_goes_on_with_purge_step(tmp_path):
    log = RunLog(tmp_path, trackers=[TensorBoard(tmp_path, {})])
    write_run(log)
    log.cut(STAGES, "reward", 10)
    assert not (tmp_path / "tensorboard" / "ppo").exists()
    log.metrics("reward", 20, {"reward/loss": 0.5})
    log.close()
    events = [event for path in sorted((tmp_path / "tensorboard" / "reward").iterdir()) for event in read_events(path)]
    assert [event.step for event in events if event.HasField("session_log")] == [11]
    found = [(event.step, value) for event in events for value in event.summary.value]
    assert [step for step, value in found if value.tag == "reward/loss"] == [0, 10, 20, 30, 20]
    assert [value.simple_value for _, value in found if value.tag == "time/seconds"] == [0.5] * 4
    table = next(value for step, value in found if value.tag == "reward/samples" and step == 20)
    assert table.metadata.plugin_data.plugin_name == "text"
    assert [dim.size for dim in table.tensor.tensor_shape.dim] == [3, 2]  # names and two rows, of two columns
    assert list(table.tensor.string_val)[:4] == [b"prompt", b"response", b"    p", b"    reward 20"]


def read_events(path):
    from tensorboardX.proto.event_pb2 import Event

    data, at, events = path.read_bytes(), 0, []
    while at < len(data):  # TFRecord: length, its checksum, the event, its checksum
        (length,) = struct.unpack_from("<Q", data, at)
        events.append(Event.FromString(data[at + 12 : at + 12 + length]))
        at += 12 + length + 4
    return events


@pytest.fixture
def small_files():
    """Sets the size that no file of this process may pass."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_tensorboard_on_a_full_disk_is_one_clear_line_and_nothing_after_it(tmp_path, capfd, small_files):
    log = RunLog(tmp_path, trackers=[TensorBoard(tmp_path, {})])
    log.metrics("ppo", 1, {"a": 1.0})
    figures = {f"name{i}": 1.0 for i in range(1000)}
    small_files(60_000)  # metrics.jsonl holds a row, the events do not fit
    with pytest.raises(InputError, match=r"events.*: cannot write: File too large; free some space"):
        for _ in range(3):
            log.metrics("ppo", 2, figures)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match=r"events.*: cannot write: File too large; free some space"):
        log.metrics("ppo", 2, figures)
    log.close()
    del log
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["tensorboard", "tensorboard/ppo"])
def test_a_file_in_place_of_tensorboards_folder_is_one_clear_line(name, tmp_path):
    log = RunLog(tmp_path, trackers=[TensorBoard(tmp_path, {})])
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=r"tensorboard/ppo: cannot write: (File exists|Not a directory); free"):
        log.metrics("ppo", 1, {"a": 1.0})
    log.close()


def test_tensorboards_records_are_checked_by_their_sums(tmp_path):
    from tensorboardX.crc32c import crc32c

    log = RunLog(tmp_path, trackers=[TensorBoard(tmp_path, {})])
    log.metrics("ppo", 3, {"ppo/a b": 1.5, "ppo/nan": float("nan")})
    (file,) = (tmp_path / "tensorboard" / "ppo").iterdir()
    data, at = file.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        for part, place in ((data[at : at + 8], at + 8), (data[at + 12 : at + 12 + length], at + 12 + length)):
            crc = crc32c(part)
            masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
            assert struct.unpack_from("<I", data, place) == (masked,)
        at += 16 + length
    first, *others = read_events(file)
    assert first.file_version == "brain.Event:2" and [event.step for event in others] == [3, 3]
    assert others[0].summary.value[0].simple_value == 1.5 and others[0].wall_time > 1e9


# JSON files


def test_json_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1, "n": float("nan")})
    assert read_json(path) == {"a": 1, "n": None}

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"x\.json: cannot write: No space left on device; free some space"):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1, "n": None}
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_text_that_is_no_utf8_comes_back(tmp_path):
    path, odd = tmp_path / "x.json", "caf\udce9 é 🙂 \ud83d"
    write_json(path, {odd: odd})
    assert read_json(path) == {odd: odd} and "é 🙂" in path.read_text(encoding="utf-8")
    RunLog(tmp_path).samples("ppo", 1, [{"response": odd}])
    assert rows(tmp_path / "samples.jsonl")[0]["response"] == odd


def test_broken_json_is_named_with_its_line(tmp_path):
    (tmp_path / "x.json").write_text('{\n"a": }')
    with pytest.raises(InputError, match=r"x\.json:2: not JSON"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "data, found", [(b'{\n"a": "\xff"}', r"x\.json:2: not UTF-8 \(byte 0xff\)"), (b"[" * 100_000, r"x\.json: not JSON"),
                    (b"[" + b"1" * 5000 + b"]", r"x\.json: not JSON")]
)  # fmt: skip
def test_json_that_no_parser_reads_is_named(data, found, tmp_path):
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(InputError, match=found + ".*restore or delete the file"):
        read_json(tmp_path / "x.json")


def test_a_full_disk_is_one_clear_line(tmp_path, small_files):
    log = RunLog(tmp_path)
    small_files(10_000)
    with pytest.raises(InputError, match=r"metrics\.jsonl: cannot write: File too large; free some space"):
        log.metrics("ppo", 1, {f"name{i}": 1.0 for i in range(1000)})


# Progress


def shown(terminal):
    out = io.StringIO()
    console = rich.console.Console(file=out, force_terminal=terminal, width=100)
    with Progress("pretrain", 300, console=console) as bar:
        bar.update(100, loss=4.2512345, tokens_per_s=21_340.0)
        bar.update(200, loss=3.5, tokens_per_s=987.0, note="[kl] 1.2")
        bar.update(300, loss=3.1)
    return out.getvalue()


def test_without_a_terminal_progress_is_one_plain_line_an_update():
    text = shown(False)
    assert "\x1b" not in text and "\r" not in text
    lines = text.splitlines()
    assert len(lines) == 3
    assert lines[0] == "pretrain 100/300  loss 4.251  21.3k tokens/s"
    assert lines[1].startswith("pretrain 200/300  loss 3.5  [kl] 1.2  987 tokens/s  0:0")
    assert lines[1].endswith(" left")
    assert lines[2] == "pretrain 300/300  loss 3.1"


def test_the_time_left_is_reckoned_by_the_given_clock():
    """From which a stage takes what was spent on compiling."""
    out, now = io.StringIO(), iter((100.0, 104.0))
    with Progress("ppo", 30, console=rich.console.Console(file=out), clock=lambda: next(now)) as bar:
        bar.update(10)
        bar.update(20)
    assert out.getvalue().splitlines()[1].endswith("  0:04 left")


def test_on_a_terminal_progress_is_a_bar():
    text = shown(True)
    assert "\x1b" in text and "━" in text
    assert "[kl] 1.2" in text and "300/300" in text


def test_other_processes_show_nothing():
    out = io.StringIO()
    with Progress("ppo", 3, shown=False, console=rich.console.Console(file=out, force_terminal=True)) as bar:
        bar.update(1, loss=1.0)
        bar.line("note")
    assert out.getvalue() == ""
