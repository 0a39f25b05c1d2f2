"""The README's part on own files, as it is printed: its records are records, its command trains on such a file."""

import functools
import itertools
import json
import pathlib
import random
import shlex
import typing

import jax
import pytest

from lfjax import cli, sharding
from lfjax.records import Feedback, Preference, Rating, read_records
from lfjax.run import run

pytestmark = pytest.mark.xdist_group("stages")
ROOT = pathlib.Path(__file__).parents[2]
FASTER = [
    "--config.pretrain.steps=4", "--config.reward.steps=4", "--config.ppo.steps=2", "--config.ppo.norm_samples=64",
    "--config.evaluate.prompts=64", "--config.evaluate.batch_size=64", "--config.run.compile_cache=False",
    "--config.run.trackers=",
]  # fmt: skip


@pytest.fixture(scope="module")
def page() -> list[str]:
    """What the page shows as code, block by block."""
    text = (ROOT / "README.md").read_text().partition("## Your own file\n")[2].partition("\n## ")[0]
    return [block.partition("\n")[2] for block in text.split("```")[1::2]]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current folder that holds the project's configs and nothing else."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_records_that_the_page_shows_are_read_as_they_stand(page, folder):
    (folder / "ratings.jsonl").write_text(page[0])
    first, second, *others = read_records(folder / "ratings.jsonl")
    assert first.feedback == [Rating(0, 4.0, (1.0, 5.0))] and second.feedback == [Preference(1, 0)]
    kinds = {type(entry) for record in others for entry in record.feedback}
    assert kinds == {*typing.get_args(Feedback)} - {Rating, Preference}  # a line of every kind


def records(shown: list[dict], count: int) -> list[dict]:
    """The page's own records with other words in them."""
    rng = random.Random(0)
    things = ("bakery", "garden", "river", "library", "train", "kitchen", "winter morning", "lighthouse")
    words = ("warm", "bright", "quiet", "honest", "golden", "stale", "noisy", "grim", "broken", "hollow")
    rows = []
    for number, row in zip(range(count), itertools.cycle(shown), strict=False):
        texts = ["{} and {}, and {} {}.".format(*rng.sample(words, 3), rng.choice(things)) for _ in row["responses"]]
        feedback = [dict(entry) for entry in row["feedback"]]
        for entry in feedback:
            if entry["kind"] == "rating":
                entry["value"] = 1 + 4 * sum(word in texts[0] for word in words[:5]) / 3
        prompt = f"{row['prompt']}{rng.choice(things).capitalize()} {number}: "
        rows.append({"prompt": prompt, "responses": texts, "feedback": feedback})
    return rows


@pytest.mark.slow
def test_the_command_that_the_page_shows_trains_on_sixty_records(page, folder, monkeypatch):
    shown = [json.loads(line) for line in page[0].splitlines()][:4]  # what the config's stages learn from
    rows = records(shown, 60)
    (folder / "ratings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (command,) = (shlex.split(line) for line in page[1].splitlines() if line.startswith("lfjax train "))
    assert "--config=ratings" in command
    monkeypatch.setattr(run, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
    assert cli.main([*command[1:], *FASTER]) == 0
    summary = json.loads((folder / "runs" / "mine" / "summary.json").read_text())
    assert summary["data/rows"] == 60 and summary["reward/rating_mean"] > 1
    assert {"ppo/score_before", "ppo/score_after", "reward/pair_accuracy", "reward/calibration_error"} <= summary.keys()
    assert (folder / "runs" / "mine" / "report.html").is_file()
