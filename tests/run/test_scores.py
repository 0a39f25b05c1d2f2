"""`lfjax score` and `lfjax sample --prompts`: what models say of a file of texts, and write to a file of prompts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfjax import cli
from lfjax.config import InputError
from lfjax.interop import hf
from lfjax.models import presets
from lfjax.models.transformer import Transformer, parameter_table
from lfjax.records import Record, read_records
from lfjax.run import samples, scores
from lfjax.sampling.text import sample_rows

SIZES = {"vocab_size": 32, "width": 16, "layers": 1, "heads": 2, "context": 16}


class Letters:
    """A token a letter; BOS 29, EOS 30, padding 31."""

    bos_id, eos_id, pad_id, eos_ids, vocab_size, template = 29, 30, 31, (30,), 32, None

    def encode(self, text, *, first=False):
        return [ord(letter) - ord("a") for letter in text]

    def encode_prompt(self, text):
        return [self.bos_id, *self.encode(text)]

    def decode(self, ids):
        return "".join(chr(i + ord("a")) for i in ids if i < 29)


def loaded(**head):
    config = presets.gpt2(**SIZES, **head)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda entry: (0.5 * rng.standard_normal(entry[0])).astype(np.float32),
        parameter_table(config),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return hf.Loaded(Transformer(config), params, {}, Letters())


def test_scores_are_each_texts_own_whatever_is_beside_it():
    model = loaded(num_labels=1)
    records = [Record("ab", ["cd", "e" * 30], id=7), Record("", ["x"])]
    rows = list(scores.score_records(model, records, scores.Said(mean=3.0), batch_size=2))
    sequences = [[29, 0, 1, 2, 3, 30], [29, *[4] * 14, 30], [29, 23, 30]]  # the prompt's start is cut first
    alone = [model.model.apply({"params": model.params}, jnp.asarray([s]))[0, 0] for s in sequences]
    np.testing.assert_allclose([row["score"] for row in rows], alone, atol=1e-5)
    np.testing.assert_allclose([row["rating"] - row["score"] for row in rows], 3.0)
    assert [(row.get("id"), row["response"], row.get("cut")) for row in rows] == [
        (7, "cd", None), (7, "e" * 30, True), (None, "x", None),
    ]  # fmt: skip


def test_classes_have_probabilities_and_the_models_names(tmp_path):
    model = loaded(num_labels=3)._replace(config={"id2label": {"0": "no", "1": "so so", "2": "yes"}})
    said = scores.told(model, tmp_path)
    row = scores.row_of(np.float32([0.0, 1.0, 3.0]), said)
    weights = np.exp([0.0, 1.0, 3.0])
    np.testing.assert_allclose([*row["probabilities"].values()], weights / weights.sum())
    assert (
        row["label"] == "yes"
        and row["score"] == row["probabilities"]["yes"]
        and [*row["probabilities"]] == [*said.labels]
    )
    several = scores.row_of(np.float32([0.0, -1e4, 1e4]), scores.Said(said.labels, several=True))
    np.testing.assert_allclose([*several["probabilities"].values()], [0.5, 0.0, 1.0], atol=1e-9)
    with pytest.raises(InputError, match="gives no scores"):
        scores.told(loaded(), tmp_path)


def test_a_sample_does_not_depend_on_its_batch():
    rows = [[29], [29, 1, 2, 3], [29, 5], [29, 7, 8]]
    whole = sample_rows(loaded(), rows, max_new_tokens=6, seed=1)
    assert sample_rows(loaded(), rows, max_new_tokens=6, seed=1, batch_size=3) == whole
    assert len(set(whole)) > 1


def test_prompts_become_records_to_rate_and_keep_what_they_have(capsys):
    records = [
        Record("ab", [], id=3, extra={"topic": "t"}),
        Record("a" * 20, [], where="p.txt:2"),
        Record("c", ["old"]),
    ]
    options = {"source": "m", "batch_size": 4, "max_new_tokens": 4, "temperature": 0.7, "stop": (), "seed": 0}
    first, second = samples.sample_records(loaded(), records, n=2, **options)
    assert (first.prompt, first.id, first.source, first.feedback) == ("ab", 3, "m", [])
    assert len(first.responses) == len(second.responses) == 2 and "old" not in second.responses
    assert first.response_fields == [{"source": "m"}] * 2
    assert first.extra == {
        "topic": "t", "sampling": {"max_new_tokens": 4, "temperature": 0.7, "stop": [], "seed": 0},
    }  # fmt: skip
    assert "1 of 3 prompts, the first at p.txt:2, leave no room for 4 more tokens" in capsys.readouterr().err
    with pytest.raises(InputError, match="give shorter ones"):
        samples.sample_records(loaded(), records[1:2], n=1, **options)


def test_a_runs_models_score_and_answer_files(straight, records, tmp_path, capsys):
    out, rated = tmp_path / "scores.jsonl", list(read_records(records))[:20]
    (tmp_path / "texts.txt").write_text("".join(record.responses[0] + "\n" for record in rated))
    assert cli.main(["score", str(straight), str(records), f"--output={out}"]) == 0
    assert f"{out}: 120 scores" in capsys.readouterr().out
    assert cli.main(["score", f"{straight}/models/reward", str(tmp_path / "texts.txt")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == [*range(120)] and lines[3]["response"] == rated[3].responses[0]
    np.testing.assert_allclose([row["score"] for row in rows[:20]], [row["score"] for row in lines], atol=1e-5)
    mean = json.loads((straight / "summary.json").read_text())["reward/rating_mean"]
    np.testing.assert_allclose(rows[0]["rating"], rows[0]["score"] + mean)
    (tmp_path / "prompts.txt").write_text("the film was\n\na meal\n")
    made = tmp_path / "made.jsonl"
    options = [f"--prompts={tmp_path}/prompts.txt", f"--output={made}", "--n=2", "--max-new-tokens=4", "--stage=sft"]
    assert cli.main(["sample", str(straight), *options]) == 0
    assert [(r.prompt, len(r.responses)) for r in read_records(made)] == [("the film was", 2), ("a meal", 2)]


def test_scores_are_those_of_transformers(straight, records, tmp_path, capsys):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = straight / "models" / "reward"
    assert cli.main(["score", str(folder), str(records)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()][:5]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = hf.load(folder).tokenizer
    for row in rows:
        ids = [tokenizer.bos_id, *tokenizer.encode(row["response"], first=True), tokenizer.eos_id]
        with torch.no_grad():
            score = model(input_ids=torch.tensor([ids])).logits.item()
        assert abs(score - row["score"]) < 2e-4
