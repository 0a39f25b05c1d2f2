"""A user's file on four scales: what is learnt is the same, and told in its points (benchmarks/replies.py)."""

import pathlib
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))
import replies

pytestmark = pytest.mark.slow


def test_held_out_scores_agree_on_every_scale_and_figures_are_in_its_points(tmp_path):
    found = replies.compare(tmp_path)
    first, *others = (found["scores"][scale] for scale in replies.SCALES)
    assert len(first) > 30 and np.ptp(first) > 0.2
    for scores in others:
        np.testing.assert_allclose(scores, first, atol=0.01)
    one, *more = (found["summaries"][scale] for scale in replies.SCALES)
    for (low, high), summary in zip(replies.SCALES[1:], more, strict=True):
        assert summary["reward/pairs"] == one["reward/pairs"] > 0
        assert summary["reward/min_gap"] == (high - low) / 8
        for name in ("pair_accuracy", "ranked_pair_accuracy", "rating_slope", "calibration_error"):
            assert summary[f"reward/{name}"] == pytest.approx(one[f"reward/{name}"], rel=0.1), name
        points = summary["reward/mse"] / (high - low) ** 2
        assert points == pytest.approx(one["reward/mse"], rel=0.1)
        assert summary["reward/rating_mean"] == pytest.approx(low + one["reward/rating_mean"] * (high - low))


def test_the_file_has_every_kind_in_every_split_at_the_sizes_asked_for(tmp_path):
    replies.write(tmp_path / "a.jsonl", replies.rows())
    counts = replies.splits(tmp_path / "a.jsonl").counts
    held_out = round(0.1 * (counts["rows"] - counts["duplicates"]))
    for name in ("validation", "test"):
        assert abs(counts[f"{name}/records"] - held_out) <= 1
    for kind in ("rating", "preference", "ranking", "edit"):
        assert all(counts[f"{name}/{kind}"] for name in ("train", "validation", "test")), kind
    assert counts["duplicates"] > 0
