import dataclasses
import html.parser
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import tracemalloc
import xml.etree.ElementTree

import numpy as np
import pytest

from lfjax import cli, report, stages
from lfjax.config import InputError
from lfjax.metrics import RunLog, write_json
from lfjax.report import catalogue, charts, checks, ending, findings, picture, rundir
from lfjax.report import html as html_page
from lfjax.report.costs import cost_lines

SUMMARY = {
    "compile/count": 14,
    "data/duplicates": 252.0,
    "data/empty": 4.0,
    "diversity/distinct2_after": 0.676,
    "diversity/distinct2_before": 0.824,
    "diversity/unique_after": 0.992,
    "diversity/unique_before": 1.0,
    "judge/positive_after": 0.941,
    "judge/positive_before": 0.465,
    "judge/positive_human": 0.526,
    "judge/positive_response_after": 0.918,
    "judge/positive_response_before": 0.41,
    "ppo/eos_share_after": 0.998,
    "ppo/eos_share_before": 0.6,
    "ppo/kl": 10.03,
    "ppo/length_after": 11.9,
    "ppo/length_before": 21.1,
    "ppo/score_after": 1.87,
    "ppo/score_before": 0.06,
    "pretrain/bits_per_byte": 1.713,
    "pretrain/perplexity": 59.2,
    "pretrain/unigram_perplexity": 432.4,
    "reward/pair_accuracy": 0.8191,
    "reward/pair_accuracy_lexicon": 0.7402,
    "reward/pair_accuracy_ridge": 0.8433,
    "time/goodput": 0.834,
    "time/total_s": 331.7,
    "tokenizer/tokens_per_text": 32.7,
    "tokenizer/vocab_size": 2000.0,
}
FIGURES = {name: figure for stage in stages.TABLE for name, figure in stage.figures.items()}
CONFIG = {
    "seed": 0,
    "stages": ["tokenizer", "pretrain", "reward", "ppo", "evaluate"],
    "data": {"source": "vader", "path": None},
    "model": {"form": "llama", "width": 128, "layers": 2, "heads": 4, "kv_heads": 4, "mlp_width": 352, "tied": True},
    "reward": {"min_gap": 1.0},
    "ppo": {"kl_coef": 0.1, "experience_step": {"min_length": 8}},
    "mesh": {"rules": []},
}
OPENINGS = (
    "The movie is",
    "i bought this for",
    "@anonymous just saw",
    "Mr. Obama has said",
    "It 's a film",
    "My phone",
)
BEFORE = (
    " a little too long and the plot of the first half is not so much as it was in the",
    " been a problem with the battery, and it does not work with my computer.",
    " the worst thing in the country, the president said.",
    " not a good , but it has a lot of the time to be a new way of the",
    " to be in the same time, it would have been a few days.",
)
AFTER = (
    " a great film with a wonderful cast.",
    " very easy to use, and the sound is excellent and works great.",
    " one of the best, and I love it.",
    " a beautiful and funny story, great for the whole family.",
    " happy with the quality of this great product!",
)


def write_stage(log, stage, steps, every, metrics):
    for step in range(every, steps + 1, every):
        log.metrics(stage, step, {name: float(f(step / steps)) for name, f in metrics.items()})
        log.timing(stage, step, seconds=every * 0.03, tokens_per_s=21_000.0 + 900 * math.sin(step), mfu=0.31)


def synthetic_run(folder, *, stages=CONFIG["stages"], summary=SUMMARY):
    """A run directory with curves like those of a real quickstart run."""
    rng = np.random.default_rng(0)
    noise = lambda size: rng.normal() * size  # noqa: E731
    log = RunLog(folder)
    write_json(folder / "config.json", CONFIG)
    if "pretrain" in stages:
        write_stage(log, "pretrain", 4000, 50, {
            "pretrain/loss": lambda t: 3.95 + 2.9 * math.exp(-6 * t) - 0.2 * t + noise(0.04),
            "optim/learning_rate": lambda t: 4e-3 * min(1, 20 * t) * (0.05 + 0.95 * (1 + math.cos(math.pi * t)) / 2),
            "optim/grad_norm": lambda t: 0.5 + 0.6 * math.exp(-9 * t) + abs(noise(0.05)),
        })  # fmt: skip
        for step, loss in ((1000, 4.42), (2000, 4.23), (3000, 4.12), (4000, 4.081)):
            row = {"pretrain/validation_loss": loss, "pretrain/perplexity": math.exp(loss)}
            log.metrics("pretrain", step, row)
    if "reward" in stages:
        write_stage(log, "reward", 1980, 50, {
            "reward/loss": lambda t: 1.1 + 1.6 * math.exp(-7 * t) - 0.3 * t + noise(0.06),
            "reward/mse": lambda t: 0.8 + 1.4 * math.exp(-7 * t) - 0.2 * t + noise(0.05),
            "reward/pair_accuracy": lambda t: 0.86 - 0.3 * math.exp(-5 * t) + noise(0.01),
            "optim/grad_norm": lambda t: 2 + abs(noise(0.4)),
        })  # fmt: skip
        for step, accuracy in ((650, 0.787), (1300, 0.813), (1950, 0.819)):
            log.metrics("reward", step, {"reward/validation_pair_accuracy": accuracy})
    if "ppo" in stages:
        write_stage(log, "ppo", 40, 1, {
            "ppo/score": lambda t: 1.55 * (1 - math.exp(-3 * t)) + noise(0.05),
            "ppo/kl": lambda t: 10.4 * (1 - math.exp(-2.4 * t)) + abs(noise(0.2)),
            "ppo/entropy": lambda t: 4.4 - 1.1 * t + noise(0.03),
            "ppo/clip_fraction": lambda t: 0.3 * math.exp(-2 * t) + abs(noise(0.01)),
            "ppo/explained_variance": lambda t: 0.2 + 0.45 * t + noise(0.03),
            "ppo/length": lambda t: 12 + 9 * math.exp(-5 * t) + noise(0.3),
            "ppo/eos_share": lambda t: 1 - 0.4 * math.exp(-9 * t),
            "ppo/rollout_train_gap": lambda t: 4e-6 + abs(noise(1e-6)),
            "optim/learning_rate": lambda t: 6e-4 * (0.1 + 0.9 * (1 + math.cos(math.pi * t)) / 2),
            "ppo/wholly_new_metric": lambda t: t**2,
        })  # fmt: skip
        for step in (10, 20, 30, 40):
            parts = {"rollout_s": 0.5, "score_s": 0.1, "experience_s": 0.2, "update_s": 1.25}
            log.timing("ppo", step, **parts)
            log.samples("ppo", step, sample_rows(rng, BEFORE if step < 20 else AFTER, 4))
    if "evaluate" in stages:
        log.metrics("evaluate", 0, {"judge/positive_after": summary["judge/positive_after"]})
        for which, texts in (("before", BEFORE), ("after", AFTER)):
            log.samples("evaluate", 0, [{**row, "set": which} for row in sample_rows(rng, texts, 24)])
        log.summary(summary)
        for stage, seconds, programs in zip(
            CONFIG["stages"], (4.6, 124.0, 108.0, 87.0, 8.1), (0, 2, 5, 6, 1), strict=True
        ):
            (folder / "checkpoints" / stage).mkdir(parents=True)
            programs = {f"{stage}/{i:08x}": 1 for i in range(programs)}
            parts = {"train": 0.8 * seconds, "compile": 0.1 * seconds, "evaluate": 0.0, "save": 0.01 * seconds}
            done = {"figures": {}, "seconds": seconds, "parts": parts, "programs": programs, "config": "0"}
            write_json(folder / "checkpoints" / stage / "FINISHED", done)
    return folder


def sample_rows(rng, texts, count):
    return [
        {
            "prompt": OPENINGS[i % len(OPENINGS)],
            "response": texts[(i * 7 + i // len(OPENINGS)) % len(texts)],
            "score": float(rng.normal() + (1.8 if texts is AFTER else 0.0)),
            "logprob": float(-30 + rng.normal()),
            "kl": float(abs(rng.normal()) + (9.0 if texts is AFTER else 0.0)),
            "length": 12 if texts is AFTER else 21,
            "judge": float(np.tanh(rng.normal() + (1.0 if texts is AFTER else 0.0))),
        }
        for i in range(count)
    ]


def built(folder) -> pathlib.Path:
    """As the command builds it: a directory without stages.json is told of with lfjax's own stages."""
    return report.build(folder, stages.described)


def read(folder) -> rundir.RunDir:
    return rundir.read(folder, stages.described)


def build(folder, **options):
    return built(synthetic_run(folder / "quickstart", **options)).read_text(encoding="utf-8")


class Page(html.parser.HTMLParser):
    """Tags, attributes and visible text of a page; fails where tags are not closed in order."""

    VOID = frozenset(("meta", "link", "img", "br", "hr", "input"))

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self._open = [], "", []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] not in ("style", "script"):
            self.text += data + " "

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return build(tmp_path_factory.mktemp("run"))


def level(run_folder, title):
    run = read(run_folder)
    found = findings.comparisons(run)
    words = findings.risen_words(findings.sample_pairs(run.samples))
    (check,) = [c for c in checks.checks(run, found, words) if c.title == title]
    return check


# The page


def test_the_page_is_well_formed_and_needs_nothing_from_elsewhere(whole):
    page = Page(whole)
    for tag, attrs in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "base"), tag
        assert not {"src", "href", "srcset"} & attrs.keys(), (tag, attrs)
    assert not re.search(r"url\(|@import|https?://", whole)
    for svg in re.findall(r"<svg.*?</svg>", whole, flags=re.S):
        xml.etree.ElementTree.fromstring(svg)


def test_the_headline_figures_stand_in_the_text(whole):
    text = Page(whole).text
    for said in ("From 46 % to 94 % positive", "46.5 %", "94.1 %", "52.6 %", "10.0", "0.676", "21.1", "11.9", "81.9 %"):
        assert said in text, said
    for said in (
        "74.0 %",
        "84.3 %",
        "59.2",
        "432",
        "5 min 32 s",
        "14 programs",
        "Goodput",
        "83.4 %",
        "33 s compiling",
        "31.0 %",
        "A PPO update (4 timed)",
        "1.2 s",
        "ppo.experience_step.min_length",
    ):
        assert said in text, said
    assert "very small language model" in text and "0.7 million" in text


def test_every_logged_metric_has_a_curve(whole):
    page = Page(whole)
    drawn = " ".join(svg.get("aria-label", "") for svg in page.all("svg"))
    titles = (
        "Loss",
        "Perplexity",
        "Pair accuracy, held out",
        "Normalised score",
        "KL from the start",
        "Entropy",
        "Clip fraction",
        "Length",
    )
    for title in (*titles, "Explained variance", "Answers that end", "Learning rate", "Gradient norm"):
        assert f"{title}: " in drawn, title
    assert "Wholly new metric: training from" in drawn  # nobody told the report of it
    assert "held out from 4.42 at step 1\u202f000 to 4.08 at 4\u202f000" in drawn  # beside the training loss


def test_simpler_methods_are_drawn_beside_what_is_held_out_as_they_are(tmp_path):
    """Not beside the training batches; and as measured on the split that the curve is of, where that is known."""
    more = {"reward/validation_pair_accuracy_ridge": 0.8512, "reward/validation_pair_accuracy_lexicon": 0.7411}
    page = Page(build(tmp_path, summary={**SUMMARY, **more}))
    of = {svg["aria-label"].split(":")[0]: svg for svg in page.all("svg") if "aria-label" in svg}
    assert "training" in of["Pair accuracy, training batches"]["aria-label"]
    held_out = of["Pair accuracy, held out"]["aria-label"]
    assert "held out from 78.7 %" in held_out and "training" not in held_out
    run = read(tmp_path / "quickstart")
    names = [("reward/pair_accuracy", "training"), ("reward/validation_pair_accuracy", "held out")]
    charts_of = {shown.title: marks for _, shown, _, marks in html_page._alike(run, names[0][0], names)}
    assert charts_of["Pair accuracy, training batches"] == []
    assert [(mark.value, mark.label) for mark in charts_of["Pair accuracy, held out"]] == [
        (0.8512, "ridge"), (0.7411, "lexicon"),
    ]  # fmt: skip


def test_samples_stand_side_by_side_in_file_order(whole):
    texts = re.findall(r'class="prompt">(.*?)</span><span class="answer">(.*?)</span>', whole)
    assert texts[0] == ("The movie is", BEFORE[0])
    assert texts[1] == ("The movie is", AFTER[0])
    assert texts[2][0] == texts[3][0] == "i bought this for"


def test_two_builds_give_the_same_bytes(tmp_path):
    folder = synthetic_run(tmp_path / "run")
    first = built(folder).read_bytes()
    assert built(folder).read_bytes() == first


HOSTILE = '</span><script>alert(1)</script><img src=x onerror="alert(2)">\x00\x1b[31m \ud800 & "\' ${{x}}'


def test_what_a_model_wrote_cannot_become_markup(tmp_path):
    folder = synthetic_run(tmp_path / "<b>run")
    log = RunLog(folder)
    rows = [{"prompt": HOSTILE.replace("\ud800", ""), "response": HOSTILE.replace("\ud800", ""), "score": 1.0, "set": s}
            for s in ("before", "after")]  # fmt: skip
    log.samples("evaluate", 1, rows)
    log.metrics("<i>stage", 1, {"<u>/<script>": 1.0})
    log.metrics("<i>stage", 2, {"<u>/<script>": 2.0})
    write_json(folder / "config.json", {**CONFIG, "data": {"path": "<script>alert(3)</script>"}})
    with open(folder / "samples.jsonl", "a") as file:  # a lone surrogate, escaped, as other writers may leave it
        file.write('{"stage": "ppo", "step": 1, "prompt": "\\ud800", "response": "\\ud800"}\n')
    text = built(folder).read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.all("script")) == 1
    assert not page.all("img") and not page.all("u")
    assert all("class" in attrs for attrs in page.all("i"))  # the legends' own
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "alert(1)" in page.text and "␀␛[31m" in page.text


def test_what_a_directory_says_of_its_stages_is_checked_and_escaped(tmp_path):
    """stages.json tells what figures are called; it may be from a stranger, as everything else."""
    folder = synthetic_run(tmp_path / "run")
    figure = {"title": HOSTILE, "unit": HOSTILE, "form": "eval", "marks": [[1.5, HOSTILE], ["x"], 3], "log": "yes"}
    rows = {
        "ppo": {"title": HOSTILE * 100, "scored_by": HOSTILE, "unit": HOSTILE, "makes": "language model", "told": 3,
                "figures": {"ppo/score": figure, "ppo/kl": [], "ppo/wholly_new_metric": {"title": "What is new"}}},
        "pretrain": [1], "reward": {"figures": {"reward/x": {"title": None}}},
        "sft": {"figures": "none"}, "evaluate": {"compares": True, "builds": "no"},
    }  # fmt: skip
    write_json(folder / "stages.json", json.loads(json.dumps(rows).replace("\\ud800", "")))
    page = Page(built(folder).read_text(encoding="utf-8"))
    assert len(page.all("script")) == 1 and not page.all("img")
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "What is new" in page.text and "alert(1)" in page.text
    known = read(folder)
    assert known.scored == "ppo" and known.compared == "evaluate" and len(known.about("ppo").title) == rundir.MOST_NAME
    assert known.figures["ppo/score"].form == "number" and not known.figures["ppo/score"].log
    assert [value for value, _ in known.figures["ppo/score"].marks] == [1.5] and "ppo/kl" not in known.figures


def test_the_policy_forbids_any_script_but_the_pages_own(whole):
    import base64
    import hashlib

    (policy,) = [m["content"] for m in Page(whole).all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    (script,) = re.findall(r"<script>(.*?)</script>", whole, flags=re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


# Partial and broken runs


@pytest.mark.parametrize("done", [(), ("pretrain",), ("pretrain", "reward"), ("pretrain", "reward", "ppo")])
def test_a_partial_run_says_what_is_missing(tmp_path, done):
    text = Page(build(tmp_path, stages=done)).text
    missing = [stage for stage in CONFIG["stages"] if stage not in done[:-1]]
    if done:
        missing.remove("tokenizer")  # a later stage has begun, so it is done
    assert f"Missing: {', '.join(missing)}." in text
    assert ("Nothing has been steered yet" in text) == ("ppo" not in done)
    if "ppo" in done:
        assert "The reward rose" in text and "figures of the training batches" in text


EVALUATED = {  # what the evaluate stage says of a run without PPO, where nothing changed
    **{k: v for k, v in SUMMARY.items() if k.startswith(("tokenizer/", "pretrain/"))},
    **{f"{key}_{which}": value for which in ("before", "after") for key, value in (
        ("judge/positive", 0.465), ("diversity/distinct2", 0.824), ("ppo/length", 21.1), ("ppo/eos_share", 0.6))},
    "judge/positive_human": 0.526,
    "ppo/kl": 21.3,
    "sft/perplexity": 12.7,
    "sft/perplexity_before": 31.5,
}  # fmt: skip
SFT = ("tokenizer", "pretrain", "sft", "evaluate")
PPO_WORDS = r"PPO|[Rr]eward|[Ss]core|steer|hack|price"


def hand_made(folder, stages, summary, *, done=None, updates=0, **config):
    """A run directory of these stages, the first `done` of them finished; PPO logged that many updates."""
    log = RunLog(folder)
    write_json(folder / "config.json", {**CONFIG, "stages": stages, **config})
    for stage in stages[:done]:
        (folder / "checkpoints" / stage).mkdir(parents=True)
        write_json(folder / "checkpoints" / stage / "FINISHED", {"seconds": 1.0})
    for step in range(1, updates + 1):
        log.metrics("ppo", step, {"ppo/score": 0.3 * step, "ppo/kl": float(step), "ppo/length": 20.0 + step})
    log.summary(summary)
    return folder


def told(folder):
    """(headline, the visible text above the tables of all figures and settings)."""
    page = built(folder).read_text(encoding="utf-8")
    return re.findall("<h1>(.*?)</h1>", page)[0], Page(page).text.split("Everything else")[0]


def test_a_fine_tuning_run_speaks_of_no_reward(tmp_path):
    headline, text = told(hand_made(tmp_path / "run", SFT, EVALUATED))
    assert headline == "Before and after fine-tuning"
    assert not re.search(PPO_WORDS, text)
    for said in (
        "calls 46.5 % of the answers to held-out prompts positive, before 46.5 %",
        "The model has moved by a KL of 21.3 nats",
        "the model before fine-tuning and after",
        "training of a very small language model (about 0.7 million parameters), fine-tuning on given answers.",
        "perplexity 12.7 on held-out answers, 31.5 before",
    ):
        assert said in text, said


@pytest.mark.parametrize(
    "title, changes",
    [
        ("An independent judge", {"judge/positive_after": 0.3}),
        ("Variety", {"diversity/distinct2_after": 0.4}),
        ("Length", {"ppo/length_after": 9.0}),
        ("Length", {"ppo/length_after": 5.0}),
        ("Endings", {"ppo/eos_share_after": 0.3}),
    ],
)
def test_what_falls_in_fine_tuning_is_no_sign_of_hacking(tmp_path, title, changes):
    folder = hand_made(tmp_path / "run", SFT, {**EVALUATED, **changes})
    check = level(folder, title)
    assert (check.level, check.verdict) == ("watch", "fell")
    headline, text = told(folder)
    assert headline == "Before and after fine-tuning" and check.text in text
    assert not re.search(PPO_WORDS + "|praise|policy|warning", text)


def test_fine_tuning_has_no_limit_on_the_distance_and_may_overshoot_people(tmp_path):
    folder = hand_made(tmp_path / "run", SFT, {**EVALUATED, "judge/positive_after": 0.8})
    run = read(folder)
    found = {check.title: check for check in checks.checks(run, findings.comparisons(run), [])}
    assert set(found) == {"An independent judge", "Variety", "Length", "Endings", "Compared with people"}
    assert found["Compared with people"].text.endswith("80.0 %. It praises more than people do.")
    assert not re.search(PPO_WORDS, told(folder)[1])


def test_words_that_gained_by_fine_tuning_carry_no_score(tmp_path):
    folder = hand_made(tmp_path / "run", SFT, EVALUATED)
    log, rng = RunLog(folder), np.random.default_rng(0)
    for which, texts in (("before", BEFORE), ("after", AFTER)):
        rows = [{**row, "set": which, "score": None} for row in sample_rows(rng, texts, 24)]
        log.samples("evaluate", 0, rows)
    text = told(folder)[1]
    assert "“great” 0.0 % → " in text and "The words that gained" in text
    assert not re.search(PPO_WORDS, text)


@pytest.mark.parametrize("accuracy, level_of_it", [(0.527, "watch"), (0.7, "ok")])
def test_a_reward_model_from_few_preferences_is_held_against_a_coin(tmp_path, accuracy, level_of_it):
    preferred = {k: v for k, v in SUMMARY.items() if not k.startswith("reward/")}
    preferred |= {"reward/pair_accuracy": accuracy, "reward/ranked_pairs": 91.0}
    folder = hand_made(tmp_path / "run", CONFIG["stages"], preferred)
    check = level(folder, "The reward model")
    assert check.level == level_of_it
    assert ("Of 91 pairs a coin puts up to 60.5 % right" in check.text) == (level_of_it == "watch")
    assert "rating point" not in told(folder)[1]  # preferences have no distance


@pytest.mark.parametrize("reward, name", [("mine:short", "reward function"), ("reward", "reward model")])
def test_the_score_is_named_after_what_gave_it(tmp_path, reward, name):
    folder = hand_made(tmp_path / "run", CONFIG["stages"], SUMMARY, ppo={"reward": reward})
    text = told(folder)[1]
    assert text.count(f"The {name}'s score") == 2  # in the paragraph and in the table
    assert f"towards what the {name} scores high" in text and ("a pleased tone" in text) == (reward == "reward")


@pytest.mark.parametrize("changes", [{"ppo/length_after": 9.0}, {"ppo/length_after": 5.0}, {"ppo/eos_share_after": 0.3},
                                     {"diversity/distinct2_after": 0.4}, {"judge/positive_after": 0.3},
                                     {"ppo/kl": 15.1}])  # fmt: skip
def test_a_hack_is_explained_only_where_the_reward_rose(tmp_path, changes):
    why = "Short answers score|So short an answer|gains by not|repeat a few phrases|move apart|possible reward hacking"
    for after in (1.87, 0.0):
        folder = hand_made(tmp_path / str(after), CONFIG["stages"], {**SUMMARY, **changes, "ppo/score_after": after})
        assert bool(re.search(why, told(folder)[1])) == (after == 1.87)


@pytest.mark.parametrize(
    "changes, headline",
    [
        ({"judge/positive_after": 0.465}, "The reward rose, the judge sees no gain"),
        ({"judge/positive_after": 0.48}, "The reward rose, the judge sees no gain"),
        ({"judge/positive_after": 0.49}, "From 46 % to 49 % positive"),
        ({"ppo/score_after": 0.09}, "The reward hardly rose"),
        ({"ppo/score_after": 0.06}, "The reward did not rise"),
        ({"ppo/score_error_before": 0.6, "ppo/score_error_after": 0.8}, "The reward hardly rose"),  # 1.81 < 2 * 1.0
        ({"ppo/score_error_before": 0.3, "ppo/score_error_after": 0.4}, "From 46 % to 94 % positive"),
    ],
)
def test_the_headline_follows_the_figures(tmp_path, changes, headline):
    assert told(hand_made(tmp_path / "run", CONFIG["stages"], {**SUMMARY, **changes}))[0] == headline


@pytest.mark.parametrize(
    "stages, done, headline, said, unsaid",
    [
        (("tokenizer", "pretrain"), 2, "Training is done", ("training of a very small", "perplexity 59.2"), PPO_WORDS),
        (("tokenizer", "pretrain"), 1, "Training is not done yet", ("Done so far: tokenizer.",), PPO_WORDS),
        (("tokenizer",), 1, "Training is done", ("What this is: a run of tokenizer.",), PPO_WORDS),
        (("reward",), 1, "Training is done", ("a reward model's training", "81.9 %"), "PPO|steer|hack|ungrammatical"),
        (
            ("tokenizer", "sft"),
            2,
            "Training is done",
            ("fine-tuning on given answers", "12.7"),
            PPO_WORDS + "|very small",
        ),
        (SFT, 3, "Nothing has been compared yet", ("before and after fine-tuning are not there yet",), PPO_WORDS),
    ],
)
def test_runs_without_a_comparison_claim_none(tmp_path, stages, done, headline, said, unsaid):
    figures = {**SUMMARY, "sft/perplexity": 12.7}
    summary = {k: v for k, v in figures.items() if k.split("/")[0] in stages[:done]}
    found, text = told(hand_made(tmp_path / "run", stages, summary, done=done))
    assert found == headline
    assert all(part in text for part in said), text
    assert not re.search(unsaid, text)
    assert "not measured" not in text


@pytest.mark.parametrize("evaluate", [(), ("evaluate",)])
@pytest.mark.parametrize("updates, headline", [(1, "Nothing has been compared yet"), (5, "The reward rose")])
def test_ppo_without_an_evaluation_shows_its_training_batches(tmp_path, evaluate, updates, headline):
    stages = ("tokenizer", "pretrain", "reward", "ppo")
    done = 4 if updates == 5 else 3
    summary = {"ppo/score": 0.3 * updates, "ppo/kl": float(updates)}  # the last row's, as the stage leaves them
    folder = hand_made(tmp_path / "run", (*stages, *evaluate), summary, done=done, updates=updates)
    found, text = told(folder)
    assert found == headline
    assert findings.comparisons(read(folder))["kl"].interim
    assert ("comparison is still to come" in text) == (updates == 5 and bool(evaluate))
    assert "not of held-out prompts" in text and "No evaluation has measured it." in text
    assert "the same sampling noise" not in text


def test_a_run_of_other_stages_and_metrics_is_shown(tmp_path):
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.metrics("distil", step, {"distil/divergence": 1.0 / step, "flat": 2.0, "gone": float("nan")})
    text = Page(built(tmp_path).read_text(encoding="utf-8")).text
    assert "Curves: distil" in text and "Divergence" in text and "0.333" in text


def test_a_torn_last_line_is_left_out_and_a_broken_one_named(tmp_path, capsys):
    folder = synthetic_run(tmp_path / "run")
    metrics = folder / "metrics.jsonl"
    with open(metrics, "a") as file:
        file.write('{"stage": "ppo", "st')
    built(folder)
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join([lines[0], "oops\n", *lines[1:]]))
    capsys.readouterr()
    text = Page(built(folder).read_text(encoding="utf-8")).text
    said = f"{metrics}:2: not a row of this log (Expecting value: line 1 column 1 (char 0)); mend or delete the line"
    assert capsys.readouterr().err == f"note: left out of the report: {said}\n"
    assert f"Left out: {said}." in text and "94.1 %" in text


HOSTILE_FILES = {
    "deep": ("summary.json", b"[" * 100_000, "nested deeper than 100"),
    "a list": ("summary.json", b"[]", "found a JSON list"),
    "figures of other types": ("summary.json", b'{"ppo/kl": {"a": 1}, "x": [1]}', "field 'ppo/kl' (and 1 more)"),
    "texts as figures": ("summary.json", b'{"pretrain/perplexity": "x", "reward/pair_accuracy": "y"}', ""),
    "too large": ("summary.json", b'{"a": ' + b"1" * 2**23 + b"}", "larger than 4 MB"),
    "stages": ("config.json", b'{"stages": {"a": 1}, "seed": 3}', "a list of names is expected"),
    "sections": ("config.json", b'{"model": [1], "ppo": 3, "reward": {"min_gap": "x"}, "stages": ["pretrain"]}', ""),
    "sizes": ("config.json", b'{"model": {"width": "a", "layers": 1e300, "heads": true}, "stages": ["pretrain"]}', ""),
    "an infinite figure": ("metrics.jsonl", b'{"stage":"ppo","step":1,"a":1e999}\n', "1e999 is too large a number"),
    "a figure of 400 digits": ("metrics.jsonl", b'{"stage":"ppo","step":1,"a":1' + b"0" * 400 + b"}\n", ""),
    "a huge step": ("metrics.jsonl", b'{"stage":"ppo","step":1' + b"0" * 400 + b"}\n", "field 'step': beyond"),
    "no object": ("timing.jsonl", b"[1]\n", "not a row of this log"),
    "a surrogate": ("metrics.jsonl", b'{"stage":"\\ud800","step":1,"\\ud800":1}\n' * 2, ""),
    "a long line": ("samples.jsonl", b"x" * 2**23, ":1: a line of more than 4 MB"),
    "not finished": ("checkpoints/ppo/FINISHED", b'{"seconds": -1, "parts": 3, "programs": {"a": "b"}}', ""),
}


@pytest.mark.parametrize("kind", HOSTILE_FILES)
def test_what_cannot_be_read_is_left_out_and_named(tmp_path, capsys, kind):
    name, content, said = HOSTILE_FILES[kind]
    folder = hand_made(tmp_path / "run", CONFIG["stages"], SUMMARY, updates=3)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content + (b'{"stage":"ppo","step":2}\n' if content.endswith(b"}\n") else b""))
    assert cli.main(["report", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{folder}/report.html\n" and err.count("\n") == bool(said) and said in err
    text = Page((folder / "report.html").read_text(encoding="utf-8")).text
    assert ("Left out:" in text) == bool(said) and said in text


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "checkpoints/ppo/FINISHED"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "dangling"])
def test_what_is_no_regular_file_is_left_out_and_never_waited_for(tmp_path, capsys, name, kind):
    folder = hand_made(tmp_path / "run", CONFIG["stages"], SUMMARY, updates=3)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    {"fifo": os.mkfifo, "device": lambda p: p.symlink_to("/dev/zero"), "folder": pathlib.Path.mkdir,
     "dangling": lambda p: p.symlink_to("nowhere")}[kind](path)  # fmt: skip
    assert cli.main(["report", str(folder)]) == 0
    err = capsys.readouterr().err
    assert err.startswith(f"note: left out of the report: {path}: ") and err.count("\n") == 1


SECRET = {
    "config.json": '{"seed": "secret"}',
    "summary.json": '{"secret": 1.0}',
    "samples.jsonl": '{"stage": "ppo", "step": 1, "set": "x", "prompt": "secret", "response": ""}\n',
    "metrics.jsonl": '{"stage": "secret", "step": 1, "x": 1.0}\n',
    "timing.jsonl": '{"stage": "secret", "step": 1, "seconds": 1.0}\n',
    "checkpoints/ppo/FINISHED": "secret",
    "checkpoints/ppo": "FINISHED",
    "checkpoints": "ppo/FINISHED",
}


@pytest.mark.parametrize("name", SECRET)
def test_a_link_that_leads_out_is_left_out_and_named_and_the_folder_itself_may_be_one(tmp_path, capsys, name):
    folder, outside = hand_made(tmp_path / "run", CONFIG["stages"], SUMMARY, updates=3), tmp_path / "outside"
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if name in ("checkpoints", "checkpoints/ppo"):
        shutil.rmtree(folder / name)
        (outside / SECRET[name]).parent.mkdir(parents=True)
        write_json(outside / SECRET[name], {"seconds": 12345.0, "parts": {}, "programs": {}})
    else:
        (folder / name).unlink(missing_ok=True)
        outside.write_text(SECRET[name])
    (folder / name).symlink_to(outside)
    (tmp_path / "named").symlink_to(folder)
    assert cli.main(["report", str(tmp_path / "named")]) == 0
    err = capsys.readouterr().err
    assert err.startswith(f"note: left out of the report: {tmp_path}/named/{name}") and err.count("\n") == 1
    assert f"a link that leads out of its folder, to {outside}" in err
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "secret" not in page and "3 h 25 min" not in page and "Left out:" in page


def test_long_names_of_a_config_and_a_summary_cost_no_memory(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"k" * 2_000_000: {str(i): 1 for i in range(150_000)}}))
    (folder / "summary.json").write_text(json.dumps({"k" * 3_900_000: [1]}))
    tracemalloc.start()
    assert cli.main(["report", str(folder)]) == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6 and len(capsys.readouterr().err) < 1000
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"The resolved config (more than {html_page.MOST_SETTINGS} settings)" in page and len(page) < 500_000


def test_a_run_of_which_nothing_can_be_read_is_refused(tmp_path, capsys):
    for name in ("config.json", "summary.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes(b"[" * 1000)
    assert cli.main(["report", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f"{tmp_path}/config.json: not JSON (nested deeper" in err
    assert not (tmp_path / "report.html").exists()


def test_a_link_planted_where_the_report_is_written_is_not_followed(tmp_path):
    folder = hand_made(tmp_path / "run", CONFIG["stages"], SUMMARY)
    (tmp_path / "precious").write_text("precious")
    for name in ("report.html", "report.html.tmp"):
        (folder / name).symlink_to(tmp_path / "precious")
    built(folder)
    assert (tmp_path / "precious").read_text() == "precious" and not (folder / "report.html").is_symlink()


def test_a_page_stays_small_and_says_what_it_leaves_out(tmp_path):
    """300 metrics of 300 rows, 4,000 settings and figures, and samples of 30,000 characters each."""
    folder = tmp_path / "run"
    log = RunLog(folder)
    rng = np.random.default_rng(0)
    values = rng.normal(size=(300, 300))
    for step, row in enumerate(values):
        log.metrics("<ppo>", step, {f"metric {i} '&": float(value) for i, value in enumerate(row)})
    long = "é'\"&" * 7500
    log.samples(
        "ppo", 1, [{"prompt": str(i), "response": long, "set": s} for i in range(40) for s in ("before", "after")]
    )
    log.samples("ppo", 1, [{"prompt": str(i), "response": long} for i in range(40)])
    log.summary({f"{i} {long[:300]}": float(i) for i in range(4000)})
    write_json(folder / "config.json", {f"{i} {long[:300]}": long for i in range(100)})
    page = built(folder).read_bytes()
    assert len(page) < 5_000_000
    text = Page(page.decode()).text
    for said in ("more charts are left out", "more pairs are left out", "more rows are left out", "more characters)"):
        assert said in text, said


ARABIC, HEBREW = "\u0633\u0644\u0627\u0645", "\u05e9\u05dc\u05d5\u05dd"


def test_the_direction_of_a_text_stays_its_own(tmp_path):
    folder = hand_made(tmp_path / "run", CONFIG["stages"], {**SUMMARY, f"{HEBREW} \u202e": 1.0, "plain": 2.0})
    log = RunLog(folder)
    for step in (1, 2):
        log.metrics(f"{ARABIC}", step, {f"x/{ARABIC}\u202e\x9b": 1.0 * step})
    log.samples("ppo", 1, [{"prompt": ARABIC, "response": "\u2067 x \u200e\u200f\u061c"}])
    page = built(folder).read_text(encoding="utf-8")
    assert (
        not re.search("[\u061c\u200e\u200f\u202a-\u202e\u2066\u2067\x7f-\x9f]", page)
        and "\\u202e" in page
        and "\\x9b" in page
    )
    for found in re.finditer(f"{ARABIC}|{HEBREW}", page):
        before = page[: found.start()]
        assert before.count("\u2068") == before.count("\u2069") + 1, page[found.start() - 50 : found.end() + 50]
    assert page.count("\u2068") == page.count("\u2069")
    assert all(p.get("dir") == "auto" for p in Page(page).all("p") if p.get("class") == "text")


def test_times_that_are_no_numbers_are_left_out(tmp_path):
    folder = synthetic_run(tmp_path / "run")
    with open(folder / "timing.jsonl", "a") as file:
        file.write('{"stage": "ppo", "step": 99, "seconds": "long", "mfu": null, "tokens_per_s": {}}\n')
    built(folder)


@pytest.mark.parametrize(
    "files, message",
    [
        (None, "no such run directory"),
        ({}, "not a run directory"),
        ({"config.json": '{"model_type": "llama"}'}, "not a run directory"),
        ({"config.json": "{"}, r"config\.json:1: not JSON"),
        ({"config.json": '{"stages": 3}'}, r"config\.json: field 'stages': found 3; a list of names is expected"),
        ({"summary.json": "[]"}, r"summary\.json: found a JSON list, not an object"),
        ({"metrics.jsonl": '{"stage": 1, "step": 0}\n{"stage": "a", "step": null}\n'}, r"metrics\.jsonl:1: "),
    ],
)
def test_what_is_no_run_is_one_clear_line(tmp_path, files, message):
    folder = tmp_path / "run"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        built(folder)
    assert "\n" not in str(caught.value)


# Findings


@pytest.mark.parametrize(
    "title, changes, expected",
    [
        ("An independent judge", {}, "ok"),
        ("An independent judge", {"judge/positive_after": 0.40}, "alarm"),
        ("An independent judge", {"judge/positive_after": 0.47}, "watch"),
        ("Variety", {"diversity/distinct2_after": 0.76 * 0.824}, "ok"),
        ("Variety", {"diversity/distinct2_after": 0.74 * 0.824}, "alarm"),
        ("Length", {"ppo/length_after": 13.0}, "ok"),
        ("Length", {"ppo/length_after": 12.5}, "alarm"),
        ("Length", {"ppo/length_before": 9.0, "ppo/length_after": 7.9}, "alarm"),
        ("Length", {"ppo/length_before": 3.0, "ppo/length_after": 3.0}, "ok"),
        ("Endings", {"ppo/eos_share_after": 0.5}, "alarm"),
        ("Endings", {}, "ok"),
        (
            "Endings",
            {"ppo/eos_share_after": 0.5, "ppo/eos_share_change_low": -0.9, "ppo/eos_share_change_high": 0.1},
            "watch",
        ),
        ("Distance from the start", {"ppo/kl": 15.1}, "alarm"),
        ("Distance from the start", {"ppo/kl": 14.9}, "ok"),
        ("Compared with people", {}, "watch"),
        ("Compared with people", {"judge/positive_after": 0.6}, "ok"),
        ("The reward model", {}, "watch"),
        ("The reward model", {"reward/pair_accuracy": 0.85}, "ok"),
        ("Sampler and trainer", {}, "ok"),
    ],
)
def test_each_check_fires_on_its_own_side_of_the_limit(tmp_path, title, changes, expected):
    check = level(synthetic_run(tmp_path / "run", summary={**SUMMARY, **changes}), title)
    assert check.level == expected
    if expected == "alarm":
        assert check.verdict == "possible reward hacking"


def test_a_falling_figure_without_a_rising_reward_is_no_hack(tmp_path):
    folder = synthetic_run(tmp_path / "run", summary={**SUMMARY, "ppo/score_after": 0.0, "ppo/length_after": 5.0})
    check = level(folder, "Length")
    assert (check.level, check.verdict) == ("alarm", "got worse")
    assert "The reward did not rise" in Page(built(folder).read_text(encoding="utf-8")).text


def test_a_word_in_most_answers_is_noticed(tmp_path):
    check = level(synthetic_run(tmp_path / "run"), "Words that gained")
    assert check.level == "watch" and "“great” 0.0 % → " in check.text


def test_word_shares_count_answers_not_words():
    pairs = [({"response": "the film"}, {"response": "great great GREAT film"})] * 6
    pairs += [({"response": "great"}, {"response": ""})] * 2
    (great,) = findings.risen_words(pairs)
    assert (great.text, great.before, great.after) == ("great", 2 / 8, 6 / 8)
    assert findings.risen_words(pairs[:3]) == []


def test_pairs_match_by_prompt_and_order():
    def row(prompt, response, which):
        return {"prompt": prompt, "response": response, "set": which}

    rows = [row("a", "1", "before"), row("b", "2", "before"), row("a", "3", "before")]
    rows += [row("b", "5", "after"), row("a", "4", "after"), row("c", "7", "after"), row("a", "6", "after")]
    found = [(before["response"], after["response"]) for before, after in findings.sample_pairs(rows)]
    assert found == [("2", "5"), ("1", "4"), ("3", "6")]


def test_parameters_are_those_of_the_described_decoder(tmp_path):
    run = read(synthetic_run(tmp_path / "run"))
    matrices = 2000 * 128 + 2 * (4 * 128 * 128 + 3 * 128 * 352)
    assert findings.parameters(run) == matrices


# Judges and intervals


def beside(name, value, low, high, n=128):
    return {name: value, f"{name}_low": low, f"{name}_high": high, f"{name}_n": float(n)}


NO_LEXICON = {k: v for k, v in SUMMARY.items() if not k.startswith("judge/")}
RIDGE = {
    **beside("judge/ridge_before", 2.91, 2.8, 3.02), **beside("judge/ridge_after", 3.42, 3.3, 3.54),
    **beside("judge/ridge_change", 0.51, 0.4, 0.62), **beside("judge/ridge_won", 0.71, 0.62, 0.8),
    **beside("judge/ridge_pair_accuracy", 0.846, 0.78, 0.9, 39),
}  # fmt: skip
SCORES = {**beside("ppo/score_change", 1.81, 1.6, 2.02), **beside("ppo/score_won", 0.92, 0.88, 0.95)}
OWN = {"ppo": {"reward": "mine:short"}, "evaluate": {"judges": []}}


@pytest.mark.parametrize(
    "changes, config, headline",
    [
        (RIDGE, {}, "From 2.91 to 3.42 rating points: +0.51 (0.4 to 0.62)"),
        (RIDGE | beside("judge/ridge_change", 0.1, -0.1, 0.3), {}, "The reward rose, the judge sees no gain"),
        (RIDGE | {"judge/ridge_pair_accuracy_low": 0.48}, {}, "The reward rose: 92.0 % (88 to 95, n 128) of pairs won"),
        (SCORES | {"reward/rating_mean": 3.0}, {}, "The reward rose by 1.81 (1.6 to 2.02) rating points"),
        (SCORES | {"reward/rating_mean": 3.0}, OWN, "The reward rose: 92.0 % (88 to 95, n 128) of pairs won"),
        (RIDGE | beside("ppo/score_change", 0.4, -0.1, 0.9), {}, "No difference seen in the reward"),
        (
            {"judge/mine_before": 1.0, "judge/mine_after": 2.0, **beside("judge/mine_won", 0.8, 0.7, 0.9)},
            {},
            "80.0 % (70 to 90, n 128) of pairs won",
        ),
        ({"judge/x_before": 1.0, "judge/x_after": 2.0, "judge/x_trained_on": 1.0}, {}, "The reward rose: 92.0 %"),
    ],
)
def test_without_the_lexicon_the_headline_is_in_rating_points_or_pairs_won(tmp_path, changes, config, headline):
    folder = hand_made(tmp_path / "run", CONFIG["stages"], {**NO_LEXICON, **SCORES, **changes}, **config)
    found, text = told(folder)
    assert found.startswith(headline)
    assert "positive" not in text and "hacking below" not in text and "lexicon" not in text.split("Reward model:")[0]
    run = read(folder)
    assert ending.lines(run)[0].startswith(f"run: {found}".translate(ending.PLAIN))
    known = findings.judge_of(run, findings.comparisons(run))
    assert ("no other judge has confirmed it" in text) == (known is None)


def test_a_reward_function_is_no_hack_because_a_lexicon_moved(tmp_path):
    """It need not be after praise; that people's ratings fell is another matter."""
    fell = {**SUMMARY, **beside("judge/positive_change", -0.1, -0.2, -0.05), "judge/positive_after": 0.36}
    function = {"ppo": {"reward": "mine:short"}}
    learnt, own = (hand_made(tmp_path / str(i), CONFIG["stages"], fell, **c) for i, c in enumerate(({}, function)))
    assert [level(f, "An independent judge").level for f in (learnt, own)] == ["alarm", "watch"]
    ratings = {**NO_LEXICON, **RIDGE, **beside("judge/ridge_change", -0.51, -0.6, -0.4), "judge/ridge_after": 2.4}
    fallen = level(hand_made(tmp_path / "2", CONFIG["stages"], ratings, **function), "An independent judge")
    assert (fallen.level, fallen.verdict) == checks.HACK


def test_a_reward_model_that_judges_is_named_by_its_stage_and_unit(tmp_path):
    summary = {**NO_LEXICON, "judge/reward_before": 0.1, "judge/reward_after": -0.4, "reward/rating_mean": 3.0}
    row = findings.comparisons(read(hand_made(tmp_path / "run", CONFIG["stages"], summary, **OWN)))["judge/reward"]
    assert row.title == "Judge: the reward model" and row.unit.startswith("rating points above the mean")


def test_a_judge_that_knows_nothing_and_a_missing_one_are_said_to_be(tmp_path):
    weak = {**NO_LEXICON, **RIDGE, "judge/ridge_pair_accuracy_low": 0.45}
    check = level(hand_made(tmp_path / "weak", CONFIG["stages"], weak), "An independent judge")
    assert check.level == "watch" and "no better than chance" in check.text
    check = level(hand_made(tmp_path / "none", CONFIG["stages"], NO_LEXICON), "An independent judge")
    assert check.level == "unknown" and "evaluate.judges" in check.text


@pytest.mark.parametrize("low, ahead", [(-0.08, False), (-0.05, False), (-0.03, True)])
def test_a_model_is_behind_a_baseline_only_where_the_interval_says_so(tmp_path, low, ahead):
    """84.6 % against 85.9 % of 39 pairs is half a pair."""
    summary = {**SUMMARY, **beside("reward/pair_accuracy", 0.846, 0.78, 0.9, 39),
               **beside("reward/pair_accuracy_ridge", 0.859, 0.8, 0.91, 39),
               **beside("reward/pair_accuracy_over_ridge", -0.013, low, -0.001 if ahead else 0.04, 39)}  # fmt: skip
    check = level(hand_made(tmp_path / "run", CONFIG["stages"], summary), "The reward model")
    assert ("is ahead of it" in check.text) == ahead == ("No difference seen" not in check.text)
    assert "84.6 % (78 to 90, n 39)" in check.text and check.level == ("watch" if ahead else "ok")


def test_the_lexicon_is_a_rival_only_where_it_judges(tmp_path):
    for judges, shown in ((["lexicon"], True), ([], False)):
        folder = hand_made(tmp_path / str(shown), CONFIG["stages"], SUMMARY, evaluate={"judges": judges})
        assert ("word lexicon: 74.0 %" in level(folder, "The reward model").text) == shown


def test_every_figure_is_told_with_its_interval(tmp_path):
    summary = {**SUMMARY, **beside("reward/pair_accuracy", 0.846, 0.78, 0.9, 39), "ppo/score": 1.2,
               **beside("judge/positive_change", 0.476, 0.43, 0.52)}  # fmt: skip
    said = findings.told(read(hand_made(tmp_path / "run", CONFIG["stages"], summary, updates=2)))
    assert said["reward/pair_accuracy"] == "84.6 % (78 to 90, n 39)"
    assert said["judge/positive_change"] == "47.6 points (43 to 52, n 128)"
    assert "ppo/score (normalised)" in said and said["compile/count"] == 14
    assert not [name for name in said if name.endswith(("_n", "_low", "_high"))]


# Charts


@pytest.mark.parametrize("low, high", [(0, 1), (-3.2, 7.9), (0.001, 0.0042), (0, 4000), (98.5, 99.1), (-1e-9, 1e-9)])
def test_ticks_are_round_inside_and_evenly_spaced(low, high):
    found = charts.ticks(low, high)
    assert 3 <= len(found) <= 8
    assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in found)
    step = found[1] - found[0]
    assert np.allclose(np.diff(found), step, rtol=1e-3)


def test_a_chart_keeps_every_point_inside_its_frame():
    rng = np.random.default_rng(0)
    cases = [
        [(0, 1.0)],
        [(5, 0.0), (5, 0.0)],
        [(i, 10.0 ** rng.uniform(-8, 8)) for i in range(50)],
        [(i, -float(i)) for i in range(9)],
        [(0, 3.0), (1, 3.0)],
        [(0, 1e30), (1, 1e30 * (1 + 2**-52))],
        [(0, -1e30), (1, 1e30)],
        [(0, 1e-320), (1, 5e-324)],
        [(0, -5e-324), (10**17, 0.0)],
    ]
    for points in cases:
        svg = charts.line_chart([charts.Line("x", points, dots=True)], label="x", marks=[charts.Mark(3.0, "m")])
        root = xml.etree.ElementTree.fromstring(svg)
        data = json.loads(root.get("data-lines"))
        for x, y, *_ in data[0]["points"]:
            assert charts.LEFT <= x <= charts.WIDTH - charts.RIGHT
            assert charts.TOP <= y <= charts.HEIGHT - charts.BOTTOM


@pytest.mark.parametrize("count", [1, 400, 401, 1000, 100_000])
def test_a_thinned_curve_keeps_its_ends_and_every_peak_of_its_stretches(count):
    values = np.random.default_rng(0).normal(size=count)
    points = [(i, float(y)) for i, y in enumerate(values)]
    points[count // 3] = (count // 3, 99.0)
    kept = charts.thin(points)
    assert len(kept) <= charts.MOST_POINTS + 2 and set(kept) <= set(points) and kept == sorted(kept)
    assert (kept[0], kept[-1]) == (points[0], points[-1]) and points[count // 3] in kept
    assert (kept == points) == (count <= charts.MOST_POINTS)
    wide = -(-2 * count // charts.MOST_POINTS)
    highest = {max(points[i : i + wide], key=lambda p: p[1]) for i in range(0, count, wide)}
    assert highest <= set(kept)


def test_a_long_moving_mean_is_that_of_the_whole_curve_at_fewer_points():
    points = [(i, float(y)) for i, y in enumerate(np.random.default_rng(0).normal(size=5000))]
    whole, some = charts.smooth(points, most=5000), charts.smooth(points)
    assert len(whole) == 5000 and len(some) == charts.MOST_POINTS and set(some) <= set(whole)
    assert (some[0], some[-1]) == (whole[0], whole[-1])
    assert np.isclose(whole[2000][1], np.mean([y for _, y in points[1875:2126]]), atol=1e-12)


@pytest.mark.parametrize("values", [(-1e300, 1e300), (1e-299, 1e300), (5e-324, 1e300), (0.0, 1e300, -1e300)])
def test_huge_figures_make_short_labels(values):
    for log in (True, False):
        svg = charts.line_chart([charts.Line("x", list(enumerate(values)))], label="x", log=log)
        assert len(svg) < 8000 and "nan" not in svg and "inf" not in svg


def test_higher_values_are_drawn_higher():
    svg = charts.line_chart([charts.Line("x", [(0, 1.0), (1, 2.0), (2, 1.5)])], label="x")
    points = json.loads(xml.etree.ElementTree.fromstring(svg).get("data-lines"))[0]["points"]
    assert points[1][1] < points[2][1] < points[0][1]
    assert points[0][0] < points[1][0] < points[2][0]


def test_the_moving_mean_keeps_the_ends_and_straight_lines():
    line = [(i, 2.0 * i) for i in range(100)]
    assert np.allclose(charts.smooth(line), line)
    noisy = [(i, float(i % 2)) for i in range(100)]
    smoothed = charts.smooth(noisy)
    assert smoothed[0] == noisy[0] and smoothed[-1] == noisy[-1]
    assert np.std([y for _, y in smoothed[5:-5]]) < 0.5 * np.std([y for _, y in noisy])


@pytest.mark.parametrize(
    "value, text",
    [(0.0, "0"), (12, "12"), (40000, "40\u202f000"), (0.4652, "0.465"), (59.24, "59.2"), (432.4, "432"), (-1.5, "−1.5"),
     (20384.6, "20\u202f385"), (2e-4, "2.0e−4"), (float("nan"), "–"), (None, "–")],
)  # fmt: skip
def test_figures_are_written_to_be_read(value, text):
    assert charts.number(value) == text


def test_an_interval_stands_behind_its_figure():
    said = charts.with_interval
    assert said(charts.percent, 0.846, 0.78, 0.9, 39.0) == "84.6 % (78 to 90, n 39)"
    assert said(charts.percent, -0.004, -0.02, -0.001) == "−0.4 % (−2.0 to −0.1)"
    assert said(charts.percent, 0.998, 0.996, 1.0, 512.0) == "99.8 % (99.6 to 100.0, n 512)"
    assert said(charts.number, 2.914, 2.8, 3.02, 1878.0) == "2.91 (2.8 to 3.02, n 1\u202f878)"
    assert said(charts.number, 1.0, None, None, 1.0) == "1 (n 1)" and said(charts.number, None) == "–"
    assert len(said(charts.percent, 1e300, -1e300, 1e300, 1e300)) < 60


def test_variants_of_a_metric_share_its_chart():
    names = ["reward/validation_pair_accuracy", "reward/pair_accuracy", "optim/grad_norm", "x/zeta", "reward/loss"]
    assert catalogue.families(names, FIGURES) == {
        "reward/loss": [("reward/loss", "training")],
        "reward/pair_accuracy": [
            ("reward/pair_accuracy", "training"),
            ("reward/validation_pair_accuracy", "held out"),
        ],
        "x/zeta": [("x/zeta", "training")],
        "optim/grad_norm": [("optim/grad_norm", "training")],
    }


def test_a_classifiers_figures_are_known_by_title_and_unit():
    shown = {key: catalogue.entry(f"classify/{key}", FIGURES) for key in ("loss", "accuracy", "f1", "recall_very good")}
    assert [entry.title for entry in shown.values()] == ["Loss", "Accuracy", "F1", "Recall: very good"]
    assert [entry.better for entry in shown.values()] == ["lower", "higher", "higher", "higher"]
    assert [entry.unit for entry in shown.values()][::3] == ["nats a text", "of this class"]
    assert shown["accuracy"].form == "percent"
    names = [f"classify/{name}" for name in ("validation_f1", "accuracy", "validation_accuracy", "loss")]
    assert list(catalogue.families(names, FIGURES)) == ["classify/loss", "classify/accuracy", "classify/f1"]


# In a browser


def test_the_end_of_a_run_is_a_sentence_and_a_few_lines_of_held_out_figures(tmp_path):
    folder = synthetic_run(tmp_path / "run")
    run = rundir.read(folder)
    headline, _ = findings.verdict(run, findings.comparisons(run), 0)
    first, *others = ending.lines(run)
    assert first == f"run: {headline}; the report warns of length." and 0 < len(others) < ending.MOST_LINES
    assert any("word lexicon" in line for line in others)  # who judges
    summary = {"reward/train_pair_accuracy": 0.9, "reward/validation_pair_accuracy": 0.7, "reward/pair_accuracy": 0.6}
    summary |= {"reward/validation_loss": 2.0, "reward/loss": 1.0, "reward/pair_accuracy_n": 9.0}
    summary |= {"reward/perplexity": 3.0, "reward/bits_per_byte": 4.0, "reward/bits_per_byte_n": 8.0}
    summary |= {"reward/validation_bits_per_byte": 5.0, "reward/validation_bits_per_byte_n": 7.0}
    run = dataclasses.replace(run, summary=summary, stages=[rundir.Stage("reward", "done")], series={}, samples=[])
    told = "loss 2, bits per byte 4 (n 8), pair accuracy 60.0 % (n 9)"  # the perplexity is training's
    assert ending.lines(run)[1:] == [f"reward: {told}"]


def test_the_costs_add_up_and_line_up(tmp_path):
    RunLog(tmp_path).summary({"time/total_s": 170.0})
    write_json(tmp_path / "config.json", {"stages": ["pretrain", "sft"]})
    for stage, seconds in (("pretrain", 120.0), ("sft", 50.0)):
        folder = tmp_path / "checkpoints" / stage
        folder.mkdir(parents=True)
        write_json(folder / "FINISHED", {"seconds": seconds, "parts": {"compile": 8.0}, "matmul_gflops": 113.6})
    lines = cost_lines(rundir.read(tmp_path), 12.0, 3.0)
    assert [line.split() for line in lines] == [
        ["part", "time", "compiling", "matmul,", "GFLOP/s"],
        ["start", "12", "s"],
        ["pretrain", "2", "min", "00", "s", "8.0", "s", "114"],
        ["sft", "50", "s", "8.0", "s", "114"],
        ["report", "3.0", "s"],
        ["all", "3", "min", "05", "s", "16", "s"],
    ]
    assert lines[2].index(" 8.0 s") == lines[3].index(" 8.0 s")


@pytest.mark.slow
def test_a_narrow_window_never_scrolls_sideways(tmp_path):
    """Chromium lays the page out 380 pixels wide; nothing may stick out."""
    browser = picture.find_browser()
    if browser is None:
        pytest.skip("no Chromium on this machine: the page was not laid out")
    text = build(tmp_path)
    measure = "(e=>[e.scrollWidth-e.clientWidth,innerWidth].join(' over '))(document.documentElement)"
    probe = f"<script>document.title={measure}</script>"
    text = (
        re.sub(r"<meta http-equiv.*?>", "", text)
        .replace("</body>", f"{probe}</body>")
        .replace("<details>", "<details open>")
    )
    page = tmp_path / "page.html"
    page.write_text(text, encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe src="{page.name}" style="width:380px;height:800px;border:0"></iframe>'
        "<script>onload=()=>document.body.append(frames[0].document.title)</script>"
    )
    command = [
        browser,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--dump-dom",
    ]
    out = subprocess.run([*command, frame.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
    assert ">0 over 380<" in out, out


@pytest.mark.slow
def test_a_picture_of_a_report_can_be_taken(tmp_path):
    if picture.find_browser() is None:
        pytest.skip("no Chromium on this machine: no picture was taken")
    folder = synthetic_run(tmp_path / "run")
    out = picture.take(built(folder), tmp_path / "report.png", width=800, height=600)
    data = out.read_bytes()
    assert data.startswith(b"\x89PNG") and int.from_bytes(data[16:20]) == 800 and int.from_bytes(data[20:24]) == 600
