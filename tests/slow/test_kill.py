"""kill -9 in every stage, the same command again, and the run ends with the same bits: benchmarks/kills.py."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))
import kills

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("kills")]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    return kills.experiment(tmp_path_factory.mktemp("kills"))


def test_every_stage_was_killed_and_every_training_stage_while_it_saved(found):
    assert all(found["kills"][stage] for stage in kills.TRAINED), found
    assert all(found["saving"][stage] for stage in kills.TRAINED), found
    assert found["kills"].total() == sum(map(len, kills.PLAN.values())) == 20, found


def test_logs_parameters_and_summary_are_those_of_the_run_that_nobody_killed(found):
    assert found["differing"] == []


def test_of_a_checkpoint_cut_short_one_line_says_so_and_from_where_the_run_goes_on(found):
    assert all(found["cut"][stage] for stage in kills.TRAINED), found
    assert len(found["said"]) == found["cut"].total(), found
    assert all("going on from step" in line for line in found["said"])


def test_nothing_half_written_is_left(found):
    assert found["left"] == []
