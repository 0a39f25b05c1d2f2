"""Learning from preferences and from calls in a run: crashed and gone on with, on a mesh, with adapters."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import smallest

from lfjax.run import training

pytestmark = pytest.mark.xdist_group("stages")
CHAIN = "--config.stages=tokenizer,pretrain,preference,kto,evaluate"
OPTIONS = [CHAIN] + [
    f"--config.{stage}.{key}={value}"
    for stage in ("preference", "kto")
    for key, value in {
        "steps": 6, "batch_size": 8, "seq_len": 32, "buckets": "(16,32)", "log_every": 2, "save_every": 4,
        "dropout": 0.1, "optim.learning_rate": 1e-2,
    }.items()
]  # fmt: skip


@pytest.fixture(scope="module")
def preferred(train, tmp_path_factory) -> pathlib.Path:
    """A finished run; the ratings of all records, which have no prompt, make its pairs."""
    workdir = tmp_path_factory.mktemp("runs") / "preferred"
    assert train(workdir, *OPTIONS) == 0
    return workdir


def summary(workdir) -> dict:
    return json.loads((workdir / "summary.json").read_text())


def test_both_stages_learn_and_are_compared(preferred):
    found = summary(preferred)
    for stage in ("preference", "kto"):
        assert found[f"{stage}/accuracy"] > 0.6 and found[f"{stage}/accuracy_low"] <= found[f"{stage}/accuracy"]
        assert f"{stage}/train_accuracy" in found and f"{stage}/validation_accuracy" in found
        assert (preferred / "models" / stage / "model.safetensors").is_file()
    assert {"ppo/kl", "ppo/kl_preference", "judge/positive_before", "judge/positive_after"} <= found.keys()
    assert found["preference/pairs"] > 0 and found["kto/train_desirable"] > 0 < found["kto/train_undesirable"]
    ref = np.load(preferred / "references" / "preference" / "train.npy")
    assert ref.dtype == np.float32 and (ref < 0).all()
    rows = [json.loads(line) for line in (preferred / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if row["stage"] == "preference")
    assert {"preference/loss", "preference/accuracy", "preference/margin", "optim/grad_norm"} <= first.keys()


class Crash(Exception):
    pass


def test_a_crash_in_either_stage_is_gone_on_from_bit_for_bit(preferred, train, tmp_path, monkeypatch):
    workdir = tmp_path / "w"
    for stage in ("preference", "kto"):
        with monkeypatch.context() as patch:
            whole = training.Pace.log

            def log(self, window, state, done, stage=stage, whole=whole):
                if self.stage == stage and done == 6:
                    raise Crash
                return whole(self, window, state, done)

            patch.setattr(training.Pace, "log", log)
            with pytest.raises(Crash):
                train(workdir, *OPTIONS)
    assert train(workdir, *OPTIONS) == 0
    assert (workdir / "metrics.jsonl").read_bytes() == (preferred / "metrics.jsonl").read_bytes()
    for stage in ("preference", "kto"):
        files = [w / "models" / stage / "model.safetensors" for w in (workdir, preferred)]
        assert files[0].read_bytes() == files[1].read_bytes()


def rows_of(workdir, stage):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == stage and f"{stage}/loss" in row]


def test_a_mesh_of_eight_devices_and_a_reference_that_is_asked_anew_give_the_same(preferred, train, tmp_path):
    given = ["--config.mesh.fsdp=4", "--config.mesh.tensor=2", "--config.mesh.data=1"]
    given += [f"--config.{stage}.keep_reference=False" for stage in ("preference", "kto")]
    assert train(tmp_path / "w", *OPTIONS, *given, CHAIN.removesuffix(",evaluate"), devices=8) == 0
    for stage in ("preference", "kto"):
        for one, other in zip(rows_of(preferred, stage), rows_of(tmp_path / "w", stage), strict=True):
            assert one[f"{stage}/loss"] == pytest.approx(other[f"{stage}/loss"], rel=1e-3)
    assert not (tmp_path / "w" / "references" / "preference" / "train.npy").exists()


def test_with_adapters_the_reference_is_the_base(preferred, train, tmp_path):
    start = f"--config.model.init_from={preferred}/models/pretrain"
    lora = ["--config.model.lora.rank=2", "--config.stages=preference,kto"]
    assert train(tmp_path / "w", *OPTIONS, *lora, start, "--config.preference.step.loss=apo_zero") == 0
    first = rows_of(tmp_path / "w", "preference")[0]
    assert first["preference/loss"] == pytest.approx(1.0, abs=0.05)  # adapters begin at no change
    assert (tmp_path / "w" / "models" / "kto" / "adapter" / "adapter_config.json").is_file()


def test_without_a_reference_nobody_is_asked(preferred, train, tmp_path):
    start = f"--config.model.init_from={preferred}/models/pretrain"
    given = ["--config.stages=preference", "--config.preference.step.loss=simpo", "--config.preference.step.beta=2.0"]
    assert train(tmp_path / "w", *OPTIONS, *given, start, "--config.preference.keep_best=accuracy") == 0
    assert not (tmp_path / "w" / "references").exists() and summary(tmp_path / "w")["preference/accuracy"] > 0.6


@pytest.mark.parametrize(
    "override, message",
    [
        ("preference.step.loss=dpo", "config.preference.step.loss: 'dpo'"),
        ("preference.step.label_smoothing=0.5", "config.preference.step.label_smoothing: 0.5"),
        ("preference.min_gap=9.0", "config.preference.min_gap: 9"),
        ("kto.threshold=9.0", "config.kto.threshold: "),
        ("preference.reference=nowhere", "config.preference.reference: no such stage or folder"),
        ("preference.step.betta=1.0", "did you mean config.preference.step.beta?"),
    ],
)
def test_what_cannot_be_is_named_in_one_line(override, message, train, tmp_path, capsys):
    rows = [{**row, "feedback": row["feedback"][:1]} for row in smallest.records()]  # ratings alone
    rated = f"--config.data.path={smallest.write_records(tmp_path / 'rated.jsonl', rows)}"
    assert train(tmp_path / "w", *OPTIONS, rated, f"--config.{override}") == 2
    assert message in capsys.readouterr().err


def test_a_kept_reference_that_is_damaged_is_named(preferred, train, tmp_path, capsys):
    workdir = pathlib.Path(shutil.copytree(preferred, tmp_path / "w"))
    (workdir / "checkpoints" / "preference" / "FINISHED").unlink()
    path = workdir / "references" / "preference" / "train.npy"
    path.write_bytes(path.read_bytes()[:-3])
    assert train(workdir, *OPTIONS) == 2
    assert f"{path}: " in capsys.readouterr().err
