"""The reward stage on a scale from 1 to 5: centred ratings, and the ordinal loss with its cutpoints, from a config."""

import itertools
import json

import numpy as np
import pytest
import smallest

from lfjax import stages
from lfjax.config import InputError, apply_override, base_config, load, validate
from lfjax.data.duplicates import SPLITS
from lfjax.data.sources import load_records
from lfjax.interop import hf
from lfjax.records import mean_ratings
from lfjax.stages.reward import rating_classes

pytestmark = pytest.mark.xdist_group("stages")


@pytest.fixture(scope="module")
def stars(tmp_path_factory):
    """The smallest records on a scale from 1 to 5."""
    rows = smallest.records()
    for row in rows:
        row["feedback"][0].update(value=3 + row["feedback"][0]["value"] * 2 / 3, scale=[1, 5])
    return smallest.write_records(tmp_path_factory.mktemp("data") / "stars.jsonl", rows)


@pytest.fixture(scope="module")
def train_reward(straight, train, stars):
    """train_reward(workdir, *overrides) -> summary of the reward stage alone, from the models of `straight`."""

    def command(workdir, *overrides: str, devices: int = 1) -> dict:
        given = (f"--config.reward.init_from={straight}/models/sft",)  # which brings the vocabulary
        options = ("--config.stages=reward", "--config.reward.head_init=zero", f"--config.data.path={stars}")
        assert train(workdir, *given, *options, *overrides, devices=devices) == 0
        return json.loads((workdir / "summary.json").read_text())

    return command


def on_scale(path, low: float, high: float):
    """The smallest records, rated from -4 to 4, on another scale."""
    rows = smallest.records()
    for row in rows:
        share = (row["feedback"][0]["value"] + 4) / 8
        row["feedback"][0].update(value=low + share * (high - low), scale=[low, high])
    return smallest.write_records(path, rows)


def scores_of(workdir) -> np.ndarray:
    """What the saved model says of sentences."""
    loaded = hf.load(workdir / "models" / "reward")
    tokens = [loaded.tokenizer.encode_prompt(row["responses"][0])[:12] for row in smallest.records(count=8)]
    return np.asarray(loaded.model.apply({"params": loaded.params}, np.asarray(tokens)))[:, 0]


@pytest.mark.parametrize("center", [True, False])
def test_a_scale_changes_nothing_but_the_points_that_figures_and_the_saved_model_speak_of(
    center, train_reward, tmp_path
):
    """Ratings from 0 to 100 and from 0 to 1: the same learning, and everything said in the file's points."""
    told, scores = {}, {}
    for high in (1, 100):
        path = on_scale(tmp_path / f"{high}.jsonl", 0, high)
        given = (f"--config.data.path={path}", f"--config.reward.center_ratings={center}")
        more = ("--config.reward.optim.learning_rate=2e-2", "--config.reward.steps=30")
        told[high] = train_reward(tmp_path / f"{high}", *given, *more)
        scores[high] = scores_of(tmp_path / f"{high}")
    np.testing.assert_allclose(scores[100] / 100, scores[1], atol=2e-3)
    assert np.abs(scores[100]).max() > 1
    one, hundred = told[1], told[100]
    for name in ("pair_accuracy", "pairs", "rating_slope", "calibration_error", "validation_rating_slope", "loss"):
        assert hundred[f"reward/{name}"] == pytest.approx(one[f"reward/{name}"], rel=1e-2), name
    for name, power in {"mse": 2, "validation_mse": 2, "rating_deviation": 1, "min_gap": 1}.items():
        assert hundred[f"reward/{name}"] == pytest.approx(one[f"reward/{name}"] * 100**power, rel=1e-2), name
    assert hundred["reward/min_gap"] == 12.5
    rows = [json.loads(line) for line in (tmp_path / "100" / "metrics.jsonl").read_text().splitlines()]
    assert max(row.get("reward/mse", 0) for row in rows) > 100  # squared points, in training as well


def test_a_reward_model_that_is_trained_further_keeps_its_points(train_reward, tmp_path):
    path = on_scale(tmp_path / "a.jsonl", 0, 100)
    given = (f"--config.data.path={path}", "--config.reward.optim.learning_rate=1e-2")
    train_reward(tmp_path / "one", *given)
    stay = (f"--config.data.path={path}", "--config.reward.optim.learning_rate=1e-12")
    train_reward(tmp_path / "two", *stay, f"--config.reward.init_from={tmp_path}/one/models/reward")
    np.testing.assert_allclose(scores_of(tmp_path / "two"), scores_of(tmp_path / "one"), rtol=1e-4, atol=1e-3)


def losses(workdir) -> list[float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["reward/loss"] for row in rows if "reward/loss" in row]


ALONE = [f"--config.reward.step.{name}={weight}" for name, weight in (("regression", 0), ("bradley_terry", 0))]
ALONE += ["--config.reward.step.ordinal=1", "--config.reward.optim.learning_rate=2e-2"]


@pytest.fixture(scope="module")
def ordinal(train_reward, tmp_path_factory):
    """(run directory, summary) with the ordinal loss alone."""
    workdir = tmp_path_factory.mktemp("runs") / "ordinal"
    return workdir, train_reward(workdir, *ALONE, "--config.reward.steps=30")


def test_a_zero_head_is_wrong_by_the_variance_and_not_by_the_mean(train_reward, stars, tmp_path):
    """Nothing is learnt here, so the error on the test split is that of the score 0."""
    data = base_config().data
    data.update(smallest.get_config().data.to_dict(), path=str(stars))
    ratings = {
        split: np.array([value for record in records for value in mean_ratings(record).values()])
        for split, records in vars(load_records(data)).items()
        if split != "counts"
    }
    mean = ratings["train"].mean()
    stay = "--config.reward.optim.learning_rate=1e-12"
    centred = train_reward(tmp_path / "centred", stay)
    assert centred["reward/rating_mean"] == pytest.approx(mean)
    assert centred["reward/mse"] == pytest.approx(np.mean((ratings["test"] - mean) ** 2), rel=1e-5)
    assert centred["reward/validation_mse"] == pytest.approx(np.mean((ratings["validation"] - mean) ** 2), rel=1e-5)
    as_given = train_reward(tmp_path / "given", stay, "--config.reward.center_ratings=False")
    assert "reward/rating_mean" not in as_given
    assert as_given["reward/mse"] == pytest.approx(np.mean(ratings["test"] ** 2), rel=1e-5)
    for name in ("reward/pairs", "reward/pair_accuracy_ridge", "reward/pair_accuracy_lexicon"):
        assert centred[name] == as_given[name]


def test_pairs_that_are_equal_once_cut_are_in_no_figure_and_counted(train_reward, tmp_path, capfd):
    rows = smallest.records()
    for row in rows:
        start = row["responses"][0] + " as before" * (40 * (row["id"] % 3 == 0))
        row["responses"] = [f"{start}, yes", f"{start}, no"]
        row["feedback"] = [{"kind": "preference", "chosen": 0, "rejected": 1}]
    path = smallest.write_records(tmp_path / "pairs.jsonl", rows)
    data = base_config().data
    data.update(smallest.get_config().data.to_dict(), path=str(path))
    splits = load_records(data)
    equal = {name: sum(record.id % 3 == 0 for record in splits[name]) for name in SPLITS}
    given = (f"--config.data.path={path}", "--config.reward.steps=2", "--config.reward.step.regression=0")
    summary = train_reward(tmp_path / "w", *given)
    for name, prefix in (("train", "train_"), ("validation", "validation_"), ("test", "")):
        assert summary[f"reward/{prefix}equal_pairs"] == equal[name] > 0
        if name != "train":
            assert summary[f"reward/{prefix}ranked_pairs"] == len(splits[name]) - equal[name] > 0
    assert f"note: stage reward: {equal['train']} pairs of training answers are equal" in capfd.readouterr().err


def test_the_ordinal_loss_trains_from_a_config_and_its_cutpoints_stay_out_of_the_model(ordinal):
    workdir, summary = ordinal
    assert summary["reward/pair_accuracy"] > 0.75
    assert {"reward/calibration_error", "reward/rating_slope", "reward/rating_mean"} <= summary.keys()
    assert "cutpoints" not in hf.load(workdir / "models" / "reward").params["head"]


def test_the_ordinal_loss_is_the_same_on_a_mesh_of_eight_devices(ordinal, train_reward, tmp_path):
    mesh = [f"--config.mesh.{axis}=2" for axis in ("data", "fsdp", "tensor")]
    train_reward(tmp_path / "w", *ALONE, "--config.reward.steps=30", *mesh, devices=8)
    np.testing.assert_allclose(losses(tmp_path / "w")[:4], losses(ordinal[0])[:4], rtol=1e-4)


def test_ppo_takes_a_reward_and_a_value_network_from_an_ordinal_model(ordinal, straight, train, tmp_path):
    models = straight / "models"
    given = ("--config.stages=ppo", f"--config.tokenizer.path={models}/tokenizer", "--config.ppo.steps=2")
    reward = f"--config.ppo.reward={ordinal[0]}/models/reward"
    assert train(tmp_path / "w", *given, reward, f"--config.ppo.init_from={models}/sft") == 0


@pytest.mark.parametrize(
    "scale, expected",
    [((1.0, 5.0), (1.5, 2.5, 3.5, 4.5)), ((0.0, 1.0), (0.5,)), ((0.5, 3.2), (1.5, 2.5)), ((-1.0, 1.0), (-0.5, 0.5))],
)
def test_bounds_lie_midway_between_the_whole_points_of_the_scale(scale, expected):
    assert rating_classes(scale) == expected


@pytest.mark.parametrize("scale", [(0.1, 0.9), (0.0, 0.5), (-1e6, 1e6)])
def test_a_scale_without_classes_of_its_own_needs_the_bounds(scale):
    with pytest.raises(InputError, match=r"config\.reward\.step\.ordinal_bounds: \(\); the rating scale .*give the"):
        rating_classes(scale)


@pytest.mark.parametrize(
    "override, message",
    [
        ("ordinal_bounds=(2.5,1.5)", "config.reward.step.ordinal_bounds: (2.5, 1.5); give increasing numbers"),
        ("ordinal_bounds=('a',)", "config.reward.step.ordinal_bounds: ('a',); give increasing numbers"),
        ("ordinal=-1", "config.reward.step.ordinal: -1.0; allowed: at least 0"),
        ("min_gap=-1", "config.reward.step.min_gap: -1.0; allowed: at least 0"),
    ],
)
def test_a_wrong_value_is_named(override, message):
    config = base_config()
    apply_override(config, f"--config.reward.step.{override}")
    with pytest.raises(InputError) as caught:
        validate(config, stages.declared())
    assert message in str(caught.value)


def rated(values, scale=(1, 5)) -> list[dict]:
    rows = smallest.records(60)
    for row, value in zip(rows, itertools.cycle(values)):
        row["feedback"] = [{"kind": "rating", "response": 0, "value": value, "scale": list(scale)}]
    return rows


@pytest.mark.parametrize(
    "rows, override, message",
    [
        (rated([3]), "seed=0", "all ratings of the train split"),
        (rated([3, 3.4]), "seed=0", "config.reward.step.min_gap: 0.5 (an eighth of the scale)"),
        (rated([3, 3.4]), "reward.step.bradley_terry=0", "config.reward.min_gap: 0.5 (an eighth of the scale)"),
        (rated([2, 4]), "reward.step.min_gap=2.5", "config.reward.step.min_gap: 2.5; the ratings of the train split"),
        (rated([2, 4]), "reward.min_gap=2.5", "config.reward.min_gap: 2.5; the ratings of the validation split"),
        (rated([0.6, 0.9], (0, 1)), "reward.step.ordinal=1", "config.reward.step.ordinal_bounds: (0.5,); every rating"),
    ],
)
def test_ratings_that_teach_nothing_end_a_run_before_it_begins(rows, override, message, train, tmp_path, capfd):
    path = smallest.write_records(tmp_path / "a.jsonl", rows)
    given = (f"--config.data.path={path}", "--config.stages=tokenizer,pretrain,reward", f"--config.{override}")
    assert train(tmp_path / "w", *given, "--config.reward.init_from=pretrain") == 2
    assert message in capfd.readouterr().err and not (tmp_path / "w").exists()


def test_a_split_whose_ratings_are_equal_says_which_fraction_would_do(train, tmp_path, capfd):
    rows, few = rated([2, 4]), "--config.data.test_fraction=0.05"
    config = load(smallest.PATH, [f"--config.data.path={smallest.write_records(tmp_path / 'a.jsonl', rows)}", few])
    for record in load_records(config.data).test:
        rows[record.id]["feedback"][0]["value"] = 3
    path = smallest.write_records(tmp_path / "b.jsonl", rows)
    given = (f"--config.data.path={path}", "--config.stages=tokenizer,pretrain,reward", few)
    assert train(tmp_path / "w", *given, "--config.reward.init_from=pretrain") == 2
    told = capfd.readouterr().err
    assert "all ratings of the test split (3) are 3" in told and "set config.data.test_fraction to 0.1" in told


def test_pairs_in_peoples_order_need_no_gap(train, tmp_path):
    """Ratings that are all equal beside preferences: these are learnt, and only they are judged by."""
    rows = rated([3])
    for row in rows:
        row["responses"].append(f"not {row['responses'][0]}")
        row["feedback"].append({"kind": "preference", "chosen": 0, "rejected": 1})
    path = smallest.write_records(tmp_path / "a.jsonl", rows)
    given = (f"--config.data.path={path}", "--config.stages=tokenizer,pretrain,reward", "--config.pretrain.steps=1")
    assert train(tmp_path / "w", *given, "--config.reward.init_from=pretrain", "--config.reward.steps=1") == 0
    summary = json.loads((tmp_path / "w" / "summary.json").read_text())
    assert summary["reward/rating_deviation"] == 0 and summary["reward/ranked_pairs"] > 0
