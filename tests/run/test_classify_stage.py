"""An encoder in the stages: as a reward model, and as a classifier beside a decoder."""

import json
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest
import smallest

from lfjax.config import InputError
from lfjax.data.examples import class_names
from lfjax.interop import hf
from lfjax.models.encoder import EncoderConfig
from lfjax.records import Label, Record
from lfjax.rewards.intervals import without
from lfjax.run import heads
from lfjax.stages.classify import class_estimates, slugs, told

pytestmark = pytest.mark.xdist_group("stages")
CLASSES = {True: "good", False: "bad"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A fresh BERT without a head, with a WordPiece vocabulary of the smallest records' words."""
    path = tmp_path_factory.mktemp("models") / "bert"
    words = {word for row in smallest.records() for word in row["responses"][0].split()}
    path.mkdir()
    (path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words)]) + "\n")
    from lfjax import tokenizers

    tokenizer = tokenizers.load(path)
    form = EncoderConfig(
        vocab_size=tokenizer.vocab_size, width=16, layers=1, heads=2, mlp_width=32, position_rows=64, init_std=0.2
    )
    model = form.build()
    params = jax.jit(lambda: model.init(jax.random.key(0), np.ones((1, 2), np.int32), method="hidden")["params"])()
    (path / "vocab.txt").replace(path.parent / "vocab.txt")
    path.rmdir()
    hf.save(path, hf.loaded_from(model, params, tokenizer))
    return path


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """The smallest records with a word as label in place of a rating's sign."""
    rows = smallest.records()
    for row in rows:
        value = CLASSES[row["feedback"][0]["value"] > 0]
        row["feedback"] = [{"kind": "label", "response": 0, "value": value}]
    return smallest.write_records(tmp_path_factory.mktemp("data") / "labelled.jsonl", rows)


def summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


OPTIONS = ("steps=30", "batch_size=8", "seq_len=24", "buckets=(24,)", "log_every=10", "optim.learning_rate=1e-2")


@pytest.fixture(scope="module")
def classified(folder, labelled, train, tmp_path_factory):
    """The run directory of a classifier, and the overrides that it was trained with."""
    options = [f"--config.classify.{option}" for option in (f"init_from={folder}", *OPTIONS)]
    options += [f"--config.data.path={labelled}", f"--config.tokenizer.path={folder}", "--config.stages=classify"]
    workdir = tmp_path_factory.mktemp("runs") / "classified"
    assert train(workdir, *options) == 0
    return workdir, options


def test_an_encoder_learns_the_classes_of_labels_and_exports_their_names(classified):
    found = summary(classified[0])
    assert found["classify/accuracy"] > found["classify/majority_accuracy"] + 0.1
    assert found["classify/accuracy_low"] <= found["classify/accuracy"] <= found["classify/accuracy_high"]
    assert found["classify/accuracy_over_majority_low"] > 0 and found["classify/accuracy_n"] == found["classify/f1_n"]
    assert found["classify/f1"] == pytest.approx((found["classify/f1_good"] + found["classify/f1_bad"]) / 2)
    config = json.loads((classified[0] / "models" / "classify" / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good"} and config["label2id"] == {"bad": 0, "good": 1}
    assert config["architectures"] == ["BertForSequenceClassification"]


def test_a_stop_in_a_classifiers_last_evaluation_ends_it_within_a_batch(classified, train, tmp_path, monkeypatch):
    (straight, options), seen = classified, []
    workdir = pathlib.Path(shutil.copytree(straight, tmp_path / "w"))
    (workdir / "checkpoints" / "classify" / "FINISHED").unlink()
    with monkeypatch.context() as patch:
        whole = heads.global_batch

        def stopping(*given):
            seen.append(os.kill(os.getpid(), signal.SIGTERM))
            return whole(*given)

        patch.setattr(heads, "global_batch", stopping)
        assert train(workdir, *options) == 130
    assert len(seen) == 1  # of 3 batches
    assert train(workdir, *options) == 0
    one, other = ({k: v for k, v in summary(w).items() if not k.startswith("time/")} for w in (straight, workdir))
    assert one == other


def test_an_encoder_is_a_reward_model_from_a_config(folder, train, tmp_path):
    options = [f"--config.reward.{option}" for option in (f"init_from={folder}", *OPTIONS, "dropout=0.0", "steps=80")]
    assert train(tmp_path / "w", *options, f"--config.tokenizer.path={folder}", "--config.stages=reward") == 0
    assert summary(tmp_path / "w")["reward/pair_accuracy"] > 0.7
    assert hf.load(tmp_path / "w" / "models" / "reward").model.config.num_labels == 1


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("sft.init_from={}", "stages=sft"), "config.sft.init_from: {} is an encoder, not a language model"),
        (("ppo.reward={}", "ppo.init_from={}", "stages=ppo"), "config.ppo.init_from: {} is an encoder"),
        (
            ("reward.init_from={}", "ppo.init_from=pretrain", "stages=('tokenizer','pretrain','reward','ppo')"),
            'config.ppo.value_init: "reward"',
        ),
    ],
)
def test_an_encoder_where_none_can_be_is_named_before_anything_is_trained(
    folder, train, tmp_path, capsys, overrides, message
):
    given = [f"--config.{item.format(folder)}" for item in (*overrides, "tokenizer.path={}")]
    assert train(tmp_path / "w", *given) == 2
    assert message.format(folder) in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def class_figures(truth, guesses, names):
    """The figures alone, of texts of as many prompts."""
    return without(told(class_estimates(truth, guesses, names, range(len(truth))), "x/"))


def test_figures_are_their_formulas():
    truth, guesses = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 0]
    found = class_figures(truth, guesses, ("a", "b", "c"))
    assert found["x/accuracy"] == pytest.approx(3 / 6)
    assert [found[f"x/precision_{n}"] for n in "abc"] == pytest.approx([2 / 4, 1 / 2, 0.0])
    assert [found[f"x/recall_{n}"] for n in "abc"] == pytest.approx([2 / 3, 1 / 2, 0.0])
    each = [2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3), 1 / 2, 0.0]
    assert [found[f"x/f1_{n}"] for n in "abc"] == pytest.approx(each)
    assert found["x/f1"] == pytest.approx(sum(each) / 3)


def test_every_class_has_figures_of_its_own_however_alike_the_names():
    names = ("A b", "a b", "a b_2", "a/b", "a_b", "a_b_2")
    assert slugs(names) == ["A_b", "a_b_3", "a_b_2_2", "a_b_4", "a_b", "a_b_2"]
    truth = list(range(6))
    found = class_figures(truth, [0, 1, 2, 3, 4, 0], names)
    assert [found[f"x/recall_{slug}"] for slug in slugs(names)] == [1.0] * 5 + [0.0]
    assert len(found) == 1 + 3 * 7


def test_classes_are_numbers_by_size_then_words():
    values = [10.0, 2.0, True, "word", False, -1.5]
    names = class_names([Record("", ["x"], [Label(0, value)]) for value in values])
    assert names == ("-1.5", "2", "10", "false", "true", "word")


def test_a_label_that_training_never_saw_names_its_record():
    from lfjax.data.examples import class_examples

    record = Record("", ["x"], [Label(0, "new")], where="FILE:7")
    with pytest.raises(InputError, match=r"^FILE:7: field 'value': found the label 'new', which no training record"):
        class_examples([record], None, ("old", "older"), max_length=8)  # type: ignore[arg-type]
