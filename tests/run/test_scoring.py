"""`lfjax eval` against float64 NumPy and the documented values of a trained model."""

import json
import math

import jax
import numpy as np
import pytest

from lfjax import cli
from lfjax.interop import hf
from lfjax.models import presets
from lfjax.models.transformer import Transformer, parameter_table
from lfjax.records import parse_record
from lfjax.run import scoring

LETTERS = "abcdefghijklmnopqrstuvwxyz .\n"
CONFIG = presets.gpt2(vocab_size=32, width=16, layers=1, heads=2, context=16)


class Letters:
    """A token a letter; BOS 29 where `begins`, EOS 30, padding 31."""

    bos_id, eos_id, pad_id, vocab_size, template = 29, 30, 31, 32, None

    def __init__(self, begins=True):
        self.begins = begins

    def encode(self, text, *, first=False):
        return [LETTERS.index(letter) for letter in text]

    def encode_prompt(self, text):
        return [self.bos_id] * self.begins + self.encode(text) or [self.bos_id]

    def decode(self, ids):
        return "".join(LETTERS[i] for i in ids if i < len(LETTERS))


@pytest.fixture(scope="module")
def loaded():
    rng = np.random.default_rng(0)
    table = parameter_table(CONFIG)
    params = jax.tree.map(
        lambda entry: (0.5 * rng.standard_normal(entry[0])).astype(np.float32),
        table,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return hf.Loaded(Transformer(CONFIG), params, {}, Letters())


def next_logprobs(params, tokens):
    """[T] log p(tokens[t + 1] | tokens[: t + 1]) of the GPT-2 form of one layer, in float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    layer = jax.tree.map(lambda x: x[0], p["layers"])

    def norm(x, at):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * at["scale"] + at["bias"]

    inputs = tokens[:-1]
    x = p["embed"]["tokens"][inputs] + p["embed"]["positions"][: len(inputs)]
    a, normed = layer["attention"], norm(x, layer["norm1"])
    q, k, v = (np.einsum("td,dnh->nth", normed, a[n]) + a[f"{n}_bias"][:, None] for n in "qkv")
    logits = np.einsum("nth,nsh->nts", q, k) / math.sqrt(q.shape[-1])
    logits = np.where(np.tri(len(inputs), dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    mixed = np.einsum("nts,nsh->tnh", weights / weights.sum(-1, keepdims=True), v)
    x = x + np.einsum("tnh,nhd->td", mixed, a["o"]) + a["o_bias"]
    up = norm(x, layer["norm2"]) @ layer["mlp"]["up"] + layer["mlp"]["up_bias"]
    act = 0.5 * up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    x = x + act @ layer["mlp"]["down"] + layer["mlp"]["down_bias"]
    logits = norm(x, p["final_norm"]) @ p["embed"]["tokens"].T
    shifted = logits - logits.max(-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logprobs[np.arange(len(inputs)), tokens[1:]]


TEXT = "the cat sat on the mat.\nthe dog sat on the log.\na cat and a dog ran."


@pytest.mark.parametrize("begins, stride", [(True, 6), (False, 16)])
def test_a_long_text_has_the_likelihood_that_windows_in_float64_give(loaded, begins, stride):
    own = loaded._replace(tokenizer=Letters(begins))
    found = scoring.score_text(own, TEXT, name="x", stride=stride, batch_size=3)
    body, nats = own.tokenizer.encode(TEXT), 0.0
    first = 0 if begins else 1
    room = 17 - begins  # tokens of the text in a row of 16 inputs and a last target
    for index in range(first, len(body)):
        done = room if index < room else room + ((index - room) // stride + 1) * stride  # where the target's row ends
        row = [29] * begins + body[max(0, min(done, len(body)) - room) : index + 1]
        nats -= next_logprobs(own.params, row)[-1]
    count = len(body) - first
    assert found["tokens"] == count and found["bytes"] == len(TEXT) - first
    assert found["nll"] == pytest.approx(nats / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / (len(TEXT) - first), rel=1e-5)
    assert found["least_context"] == room - stride


def test_an_ngram_that_read_the_text_knows_it_better_than_one_that_reads_it(loaded):
    found = [scoring.score_text(loaded, TEXT, name="x", train_text=text) for text in (TEXT, None, "qqq")]
    assert [f["nll"] for f in found] == [found[0]["nll"]] * 3
    assert found[0]["ngram_nll"] < found[1]["ngram_nll"] < found[2]["ngram_nll"]
    assert found[0]["ngram_perplexity"] == pytest.approx(math.exp(found[0]["ngram_nll"]))


def test_completions_have_the_sums_of_float64_with_and_without_their_end(loaded):
    lines = [("the ", ["cat", ""]), ("", ["a dog sat."])]
    records = [
        parse_record({"prompt": p, "responses": r, "id": f"r{i}"}, feedback=False) for i, (p, r) in enumerate(lines)
    ]
    rows = scoring.score_completions(loaded, records, batch_size=2)
    assert [(row["record"], row["id"], row["response"]) for row in rows] == [(0, "r0", 0), (0, "r0", 1), (1, "r1", 0)]
    for row in rows:
        prompt, text = lines[row["record"]][0], lines[row["record"]][1][row["response"]]
        ids = [29, *loaded.tokenizer.encode(prompt + text), 30]
        expected = next_logprobs(loaded.params, ids)[-len(text) - 1 :]
        assert (row["tokens"], row["tokens_with_eos"]) == (len(text), len(text) + 1)
        assert row["logprob"] == pytest.approx(expected[:-1].sum(), rel=1e-5)
        assert row["logprob_with_eos"] == pytest.approx(expected.sum(), rel=1e-5)
        assert row["logprob_mean_with_eos"] == pytest.approx(expected.mean(), rel=1e-5)
        assert row["logprob_mean"] is None if not text else row["logprob_mean"] == pytest.approx(expected[:-1].mean())


def test_a_text_of_a_few_tokens_comes_with_a_caution(loaded, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(hf, "load", lambda folder, base=None: loaded)
    (tmp_path / "run").mkdir()
    for size, said in ((99, "99 tokens: too few to judge a model by; give 100 or more\n"), (100, "")):
        text = tmp_path / "text.txt"
        text.write_text("a" * size, encoding="utf-8")
        assert cli.main(["eval", str(tmp_path / "run"), f"--text={text}", "--json"]) == 0
        out, err = capfd.readouterr()
        assert json.loads(out)["tokens"] == size
        assert err == (f"note: {text}: {said}" if said else "")


def test_every_documented_likelihood_of_a_trained_model(shared):
    cases = json.loads((shared / "data" / "stories260K" / "golden.json").read_text())["nll"]
    loaded = hf.load(shared / "data" / "stories260K_hf")
    rows = [loaded.tokenizer.encode_prompt(case["text"]) for case in cases]
    found = scoring.row_logprobs(loaded, rows)
    assert len(cases) == 10 and [len(row) for row in found] == [case["n_tokens"] for case in cases]
    expected = [case["nll_per_token"] for case in cases]
    np.testing.assert_allclose([-row.mean() for row in found], expected, atol=2e-4, rtol=0)


def test_the_command_gives_a_trained_models_documented_likelihood(shared, tmp_path, capfd):
    golden = json.loads((shared / "data" / "stories260K" / "golden.json").read_text())["nll"][0]
    folder, text = shared / "data" / "stories260K_hf", tmp_path / "story.txt"
    text.write_text(golden["text"], encoding="utf-8")
    assert cli.main(["eval", str(folder), f"--text={text}", "--json", f"--output={tmp_path / 'out.json'}"]) == 0
    (line,) = capfd.readouterr().out.splitlines()
    found = json.loads(line)
    assert found == json.loads((tmp_path / "out.json").read_text())
    assert found["tokens"] == golden["n_tokens"]
    assert found["nll"] == pytest.approx(golden["nll_per_token"], abs=2e-4)
    (tmp_path / "c.jsonl").write_text(json.dumps({"prompt": "", "responses": [golden["text"]]}) + "\n")
    assert cli.main(["eval", str(folder), f"--completions={tmp_path / 'c.jsonl'}", "--json"]) == 0
    row = json.loads(capfd.readouterr().out)
    assert -row["logprob_mean"] == pytest.approx(golden["nll_per_token"], abs=2e-4)
    assert cli.main(["eval", str(folder), f"--completions={tmp_path / 'c.jsonl'}"]) == 0
    assert f"{row['logprob']:.4f}" in capfd.readouterr().out
