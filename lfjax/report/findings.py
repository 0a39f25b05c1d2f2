"""What a run's figures say: before and after, the words that gained, a verdict in plain words."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lfjax.report import catalogue
from lfjax.report.charts import number, percent, with_interval
from lfjax.report.rundir import RunDir, is_figure

JUDGE_NOISE = 0.02  # share: a smaller gain is none
PAIRS_FOR_WORDS = 8  # before/after samples below which words are not counted

STOP_WORDS = frozenset(
    (
        *("all", "and", "are", "been", "but", "can", "for", "from", "had", "has", "have", "her", "him", "his", "into"),
        *("its", "not", "one", "out", "she", "than", "that", "the", "their", "there", "they", "this", "very", "was"),
        *("were", "what", "when", "which", "who", "will", "with", "would", "you"),
    )
)


class Interval(NamedTuple):
    """A 95 % interval, and of how many things the figure is; None: not known."""

    low: float | None = None
    high: float | None = None
    n: float | None = None

    @property
    def seen(self) -> bool | None:
        """Of a difference, whether one is seen: 0 is outside. None: there is no interval."""
        return None if self.low is None or self.high is None else self.low > 0 or self.high < 0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One figure before and after. `interim`: from the training batches, as no evaluation has run yet.

    `around`: the intervals of before, after and the change.
    """

    key: str
    title: str
    unit: str
    before: float
    after: float
    form: Callable[[float | None], str] = number
    mark: float | None = None
    interim: bool = False
    around: tuple[Interval, Interval, Interval] = (Interval(), Interval(), Interval())

    @property
    def change(self) -> str:
        """The change in the figure's own form, with its sign and interval; or that none is seen."""
        difference, around = self.after - self.before, self.around[2]
        text = with_interval(self.form, difference, around.low, around.high).replace(" %", " points")
        text = ("+" if difference > 0 else "") + text
        return f"no difference seen: {text}" if around.seen is False else text

    def said(self, which: str) -> str:
        """The figure "before" or "after" with its interval."""
        value, place = (self.before, 0) if which == "before" else (self.after, 1)
        return with_interval(self.form, value, *self.around[place])

    @property
    def rose(self) -> bool | None:
        """Whether the change is seen and upwards; None: its interval is not known."""
        return None if self.around[2].seen is None else self.around[2].seen and self.after > self.before

    @property
    def fell(self) -> bool | None:
        """Whether the change is seen and downwards; None: its interval is not known."""
        return None if self.around[2].seen is None else self.around[2].seen and self.after < self.before


@dataclasses.dataclass(frozen=True)
class Word:
    """A word and the shares of answers that hold it."""

    text: str
    before: float
    after: float


def comparisons(run: RunDir) -> dict[str, Comparison]:
    """Every before/after figure that the run has, by key, in reading order."""
    human, scored = figure(run, "judge/positive_human"), run.about(run.scored).title
    table = (
        ("score", f"The {reward_name(run)}'s score", f"{score_unit(run)}; {scored} was trained on this", number, None),
        ("judge/positive", "Positive to the judge", "prompt + answer; a word lexicon no training saw", percent, human),
        ("judge/ridge", "The judge's rating", f"rating points; {ridge_judge(run)}", number, None),
        *_further_judges(run),
        ("judge/positive_response", "Answer alone positive", "share; the same judge on the answer only", percent, None),
        ("diversity/distinct2", "Variety, matched distinct-2", "new word pairs in equal amounts of text", number, None),
        ("diversity/unique", "Different answers", "share of answers that are not copies", percent, None),
        ("length", "Length", "tokens an answer", number, None),
        ("eos_share", "Answers that end", "share that ends before the limit", percent, None),
    )  # fmt: skip
    found = {}
    for key, title, unit, form, mark in table:
        names = (f"{key}_{which}" for which in ("before", "after"))
        names = [name if "/" in name else run.named(name) for name in names]
        before, after = (figure(run, name) for name in names)
        interim = before is None or after is None
        if interim:
            points = run.points(run.named(key))
            if len(points) < 2:
                continue
            before, after = points[0][1], points[-1][1]
            unit = "normalised" if key == "score" else unit
        change = f"{names[1].removesuffix('_after')}_change"
        around = () if interim else tuple(interval(run, name) for name in (*names, change))
        more = {"around": around} if around else {}
        found[key] = Comparison(key, title, unit, before, after, form, mark, interim, **more)  # type: ignore[arg-type]
    kls, interim = run.points(run.named("kl")), not any(key.endswith("_after") for key in run.summary)
    kl = kls[-1][1] if interim and kls else figure(run, run.named("kl"))
    if kl is not None:
        around = (Interval(), Interval() if interim else interval(run, run.named("kl")), Interval())
        title, unit = "Distance from the start (KL)", "nats a sequence"
        found["kl"] = Comparison("kl", title, unit, 0.0, kl, interim=interim, around=around)
    return found


def interval(run: RunDir, name: str) -> Interval:
    """What stands beside a figure of summary.json."""
    return Interval(*(figure(run, f"{name}_{part}") for part in ("low", "high", "n")))


def said(run: RunDir, name: str, form: Callable[[float | None], str] = number) -> str:
    """A figure of summary.json with its interval."""
    return with_interval(form, figure(run, name), *interval(run, name))


def told(run: RunDir) -> dict[str, Any]:
    """Every figure of summary.json, ready to read, with its interval in place of three figures more.

    Beside a score that is normalised stands that it is: others of its name are as the reward says them.
    """
    beside = {f"{name}_{part}" for name in run.summary if f"{name}_n" in run.summary for part in ("n", "low", "high")}
    figures = {}
    for name, value in sorted(run.summary.items()):
        if name in beside:
            continue
        if isinstance(value, float):
            form = catalogue.form_of(name, run.figures)
            counted = value.is_integer() and form is number and f"{name}_n" not in run.summary
            value = number(int(value)) if counted else said(run, name, form)
            value = value.replace(" %", " points") if name.endswith("_change") or "_over_" in name else value
        known = run.figures.get(name)
        figures[name + " (normalised)" * (known is not None and known.title.startswith("Normalised"))] = value
    return figures


def score_unit(run: RunDir) -> str:
    """What a score of the run's reward is in."""
    learnt = reward_name(run) == "reward model" and figure(run, run.named("rating_mean")) is not None
    return "rating points above the mean of the training ratings" if learnt else "as it says it"


def ridge_judge(run: RunDir) -> str:
    """What the judge that is fitted to the held-out ratings is, and how well it judges."""
    told = said(run, "judge/ridge_pair_accuracy", percent)
    return f"ridge regression on held-out ratings, which orders {told} of other held-out pairs as people do"


def lexicon_judges(run: RunDir) -> bool:
    """Whether the run's config names the lexicon; one of before it could name a judge did."""
    named = settings(run.config, "judges")
    return not named or any(isinstance(judges, (list, tuple)) and "lexicon" in judges for judges in named)


def judge_of(run: RunDir, found: dict[str, Comparison]) -> Comparison | None:
    """The judge that the headline goes by: the lexicon, ridge, or another that training was not towards.

    None where there is none, or but a ridge that is no better than chance on pairs of its own kind.
    """
    others = (key for key in found if key.startswith("judge/") and not figure(run, f"{key}_trained_on"))
    keys = (key for key in others if key != "judge/positive_response" and (key != "judge/ridge" or ridge_knows(run)))
    return next((found[key] for key in keys), None)


def ridge_knows(run: RunDir) -> bool:
    """Whether the judge fitted to the held-out ratings is better than chance."""
    low = interval(run, "judge/ridge_pair_accuracy").low
    return low is not None and low > 0.5


def _further_judges(run: RunDir):
    """Rows of `comparisons` for the judges beside the lexicon and ridge; one that training learnt to please says so."""
    for key in (name.removesuffix("_before") for name in run.summary if name.startswith("judge/")):
        if f"{key}_before" in run.summary and key not in ("judge/positive", "judge/positive_response", "judge/ridge"):
            name, towards = key.removeprefix("judge/"), figure(run, f"{key}_trained_on")
            learnt = "training has learnt to please it" if towards else "training was not towards it"
            rated = figure(run, f"{name}/rating_mean") is not None
            unit = "rating points above the mean of the training ratings" if rated else "mean score"
            title = f"Judge: {run.about(name).title}" if name in run.known else f"Judge {name}"
            yield key, title, f"{unit}; {learnt}", number, None


def tuned_by(run: RunDir) -> str:
    """What lies between before and after: the last stage that makes a language model of another, and those before it.

    Without figures of a model between, the last one was compared with its own start.
    """
    made = ((stage.name, run.about(stage.name)) for stage in run.stages)
    tuned = [(name, about.title) for name, about in made if about.makes == "language model" and not about.builds]
    between = [
        title for name, title in tuned[:-1] if f"length_{name}" in {key.rpartition("/")[2] for key in run.summary}
    ]
    return " and ".join([*between, *(title for _, title in tuned[-1:])]) or "training"


def reward_name(run: RunDir) -> str:
    """What gave the scores."""
    return run.about(run.scored).scored_by or "reward model"


def figure(run: RunDir, key: str) -> float | None:
    """A number of summary.json, None where there is none."""
    value = run.summary.get(key)
    return float(value) if isinstance(value, (int, float)) else None


def score_rose(run: RunDir, found: dict[str, Comparison]) -> bool:
    """Whether the reward rose by more than noise: the interval of the difference is above 0.

    Without one, by two standard errors; in a run whose evaluation is to come, by a twentieth of a standard score.
    """
    score = found.get("score")
    if score is not None and score.rose is not None:
        return score.rose
    errors = [figure(run, run.named(f"score_error_{which}")) for which in ("before", "after")]
    noise = 0.05 if None in errors else 2.0 * math.hypot(*errors)  # type: ignore[arg-type]
    return score is not None and score.after - score.before > noise


def sample_pairs(samples: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The rows marked "before" and "after" of the same prompt, in file order; the n-th of a prompt with its n-th."""
    waiting: dict[str, deque[dict[str, Any]]] = defaultdict(deque)
    for row in samples:
        if row.get("set") == "before":
            waiting[str(row.get("prompt", ""))].append(row)
    pairs = []
    for row in samples:
        if row.get("set") == "after" and (before := waiting.get(str(row.get("prompt", "")))):
            pairs.append((before.popleft(), row))
    return pairs


def risen_words(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], most: int = 8) -> list[Word]:
    """The words whose share of answers rose most; [] where there are too few pairs to count."""
    if len(pairs) < PAIRS_FOR_WORDS:
        return []
    counts = [Counter(word for pair in pairs for word in _word_set(pair[side].get("response"))) for side in (0, 1)]
    size = len(pairs)
    words = [Word(word, counts[0][word] / size, counts[1][word] / size) for word in counts[1]]
    words = [word for word in words if word.after - word.before >= 2 / size]
    return sorted(words, key=lambda word: (word.before - word.after, word.text))[:most]


def _word_set(text: Any) -> set[str]:
    return {w for w in re.findall(r"[^\W\d_]+", str(text or "").lower()) if len(w) > 2} - STOP_WORDS


def verdict(run: RunDir, found: dict[str, Comparison], alarms: int) -> tuple[str, str]:
    """(headline, paragraph): what changed, in plain words."""
    score, judge, kl = found.get("score"), judge_of(run, found), found.get("kl")
    if score is None and judge is None:
        return _not_compared(run)
    parts, rose = [], score_rose(run, found)
    if judge is not None:
        parts.append(_judgement(run, judge))
    if score is not None:
        parts.append(_scored(run, score, alone=judge is None and not score.interim))
    if kl is not None:
        price = "The price is" if rose else "The model has moved by"
        parts.append(f"{price} a KL of {number(kl.after)} nats a sequence from the model it started as.")
    if score is not None and score.interim:
        coming = "; the held-out comparison is still to come" if run.state(run.compared) not in ("", "done") else ""
        parts.append(f"These are figures of the training batches{coming}.")
    if alarms:
        kind = "warning of possible reward hacking" if rose else "warning"
        parts.append(f"One {kind} is explained below." if alarms == 1 else f"{alarms} warnings are explained below.")
    return _headline(run, score, judge, rose), " ".join(parts)


def _judgement(run: RunDir, judge: Comparison) -> str:
    """What the judge says, in a sentence or two."""
    if judge.key == "judge/positive":
        share = f"{percent(judge.after)} of the answers to held-out prompts positive, before {percent(judge.before)}"
        return f"An independent judge, a word lexicon, calls {share}."
    name = f"A judge that learnt from no training data ({ridge_judge(run)})"
    name = name if judge.key == "judge/ridge" else f"{judge.title}, which training was not towards,"
    unit = " rating points" if judge.key == "judge/ridge" else ""
    rates = f"{name} rates the answers to held-out prompts {judge.said('after')}{unit}, before {number(judge.before)}"
    won = won_by(run, judge.key)
    return f"{rates}: {judge.change}.{f' Of pairs on the same prompt the answer after wins {won}.' if won else ''}"


def _scored(run: RunDir, score: Comparison, *, alone: bool) -> str:
    """What the reward says; `alone`: no judge that it was not trained towards says anything."""
    text = f"The {reward_name(run)}'s score went from {number(score.before)} to {number(score.after)}"
    if not alone or score.around[2].seen is None:
        return f"{text}."
    won, by = won_by(run, run.named("score_won").removesuffix("_won")), run.about(run.scored).title
    told = f" Of pairs on the same prompt the answer after wins {won}." if won else ""
    return f"{text}: {score.change}.{told} {by} was trained towards this score, and no other judge has confirmed it."


def won_by(run: RunDir, key: str) -> str:
    """The share of pairs on the same prompt that the answer after wins, with its interval; "" where not known."""
    return "" if figure(run, f"{key}_won") is None else said(run, f"{key}_won", percent)


def _headline(run: RunDir, score: Comparison | None, judge: Comparison | None, rose: bool) -> str:
    if score is None and (judge is None or judge.key == "judge/positive"):
        return f"Before and after {tuned_by(run)}"
    if score is not None and not rose:
        if score.around[2].seen is False:
            return "No difference seen in the reward"
        return "The reward hardly rose" if score.after > score.before else "The reward did not rise"
    if judge is None:
        return _reward_headline(run, score)
    subject = "No difference seen" if score is None else "The reward rose, the judge sees no gain"
    if judge.key == "judge/positive":
        gained = f"From {whole(judge.before)} to {whole(judge.after)} positive"
        return subject if judge.after < judge.before + JUDGE_NOISE or judge.rose is False else gained
    if judge.around[2].seen is False:
        return subject
    if judge.key == "judge/ridge":
        low, high = judge.around[2].low, judge.around[2].high
        change = with_interval(number, judge.after - judge.before, low, high)
        sign = "+" if judge.after > judge.before else ""
        return f"From {number(judge.before)} to {number(judge.after)} rating points: {sign}{change}"
    won = won_by(run, judge.key)
    return f"{won} of pairs won" if won else f"From {number(judge.before)} to {number(judge.after)}"


def _reward_headline(run: RunDir, score: Comparison | None) -> str:
    """Where the reward that was trained towards is all that there is."""
    around = Interval() if score is None else score.around[2]
    if score is None or around.seen is None:
        return "The reward rose"
    if score_unit(run).startswith("rating points"):
        by = with_interval(number, score.after - score.before, around.low, around.high)
        return f"The reward rose by {by} rating points"
    won = won_by(run, run.named("score_won").removesuffix("_won"))
    return f"The reward rose: {won} of pairs won" if won else "The reward rose"


def _not_compared(run: RunDir) -> tuple[str, str]:
    done = [stage.name for stage in run.stages if stage.state == "done"]
    so_far = f"Done so far: {', '.join(done)}." if done else "No stage is done yet."
    if {run.state(run.scored), run.state(run.compared)} & {"started", "missing"}:
        headline = f"Nothing has been {'steered' if run.state(run.scored) == 'missing' else 'compared'} yet"
        return headline, f"The figures before and after {tuned_by(run)} are not there yet. {so_far}"
    headline = "Training is done" if run.complete else "Training is not done yet"
    return headline, f"No stage of this run compares a model before and after. {so_far}"


def whole(share: float) -> str:
    """A share as "46 %"."""
    return f"{100 * share:.0f} %"


def what_it_is(run: RunDir) -> str:
    """A calm word on what the run does, and on what can be expected of a model of its size."""
    count, reward, model, broken = parameters(run), reward_name(run), "a language model", ""
    if count is not None and count <= 3e8:
        model = f"a very small language model (about {number(round(count / 1e6, 1) or count / 1e6)} million parameters)"
        broken = " Its sentences are often ungrammatical."
    if run.scored:
        pleased = setting(run.config, "data.source") == "vader" and reward == "reward model"
        return (
            f"What this is: the steering of {model}.{broken} {run.about(run.scored).title} teaches it nothing about"
            f" the world; it moves the odds towards what the {reward} scores high"
            f"{', which here is a pleased tone' if pleased else ''}. Whether that "
            "is good writing is another question, which these figures do not answer."
        )
    kinds = [run.about(stage.name).told.replace("{model}", model) for stage in run.stages]
    named = ", ".join(filter(None, kinds))
    return f"What this is: {named or 'a run of ' + ', '.join(stage.name for stage in run.stages)}.{broken}"


def parameters(run: RunDir) -> float | None:
    """Approximate number of parameters of the decoder that the config describes, None where it is another."""
    model = run.config.get("model")
    model = model if isinstance(model, dict) else {}
    vocab = _size(run.summary.get(run.named("vocab_size"))) or _size(setting(run.config, "tokenizer.vocab_size"))
    width, layers, heads, mlp = (_size(model.get(name)) for name in ("width", "layers", "heads", "mlp_width"))
    built = any(run.about(stage.name).builds for stage in run.stages)
    if not built or model.get("init_from") or min(vocab, width, layers, heads, mlp) <= 0:
        return None
    kv_share = (_size(model.get("kv_heads")) or heads) / heads
    matrices = 3 if model.get("form", "llama") == "llama" else 2
    block = width * width * (2 + 2 * kv_share) + matrices * width * mlp
    return float(vocab * width * (1 if model.get("tied", True) else 2) + layers * block)


def _size(value: Any) -> int:
    """A number of rows or units, 0 where it is none."""
    return int(value) if is_figure(value) and 0 < value < 1e9 else 0


def setting(config: dict[str, Any], path: str) -> Any:
    """config["a"]["b"] for "a.b", None where there is none."""
    for key in path.split("."):
        config = config.get(key) if isinstance(config, dict) else None  # type: ignore[assignment]
    return config


def settings(config: Any, leaf: str) -> list[Any]:
    """Every value of this name in a section and those below it."""
    if not isinstance(config, dict):
        return []
    own = [config[leaf]] if leaf in config else []
    return own + [value for section in config.values() for value in settings(section, leaf)]
