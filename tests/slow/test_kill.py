"""kill -9 in every stage, the same command again, and the run ends with the same bits: benchmarks/kills.py."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))
import kills
import smallest
import vader_package

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("kills")]
MORE_STEPS = (
    *(f"--config.{stage}.save_every=2" for stage in ("pretrain", "sft", "reward", "ppo")),
    *(f"--config.{stage}.steps=30" for stage in ("pretrain", "sft", "reward")),
    "--config.ppo.steps=16",
    "--config.run.trackers=tensorboard",
)


def rows_of(runs: kills.Runs, count: int) -> list[dict]:
    rows = list(kills.experiment(runs, count))
    assert len(rows) == count and {row["stage"] for row in rows} == set(runs.stages)
    return rows


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    return rows_of(kills.Runs(tmp_path_factory.mktemp("kills"), *MORE_STEPS), 10)


def test_every_training_stage_was_killed_while_it_saved(found):
    trained = {stage for stage in smallest.STAGES if stage not in kills.UNTRAINED}
    assert {row["stage"] for row in found if row["saving"]} == trained, found
    assert {row["stage"] for row in found if row["cut"]} == trained, found


def test_logs_parameters_and_summary_are_those_of_the_run_that_nobody_killed(found):
    assert [row["differing"] for row in found] == [[]] * len(found), found


def test_of_a_checkpoint_cut_short_one_line_says_so_and_from_where_the_run_goes_on(found):
    assert [len(row["said"]) for row in found] == [int(row["cut"]) for row in found], found
    assert all("going on from step" in line for row in found for line in row["said"])


def test_so_is_the_chain_on_the_rated_sentences(tmp_path):
    vader_package.package()
    rows = rows_of(kills.Runs(tmp_path / "runs", config=kills.TINY), 6)
    assert [row["differing"] for row in rows] == [[]] * 6, rows
    assert sum(row["saving"] for row in rows) >= 3 and sum(row["cut"] for row in rows) == 3, rows
