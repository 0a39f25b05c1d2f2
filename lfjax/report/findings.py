"""What a run's figures say: before and after, the words that gained, a verdict in plain words."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

from lfjax.report.charts import number, percent
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


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One figure before and after. `interim`: from the training batches, as no evaluation has run yet."""

    key: str
    title: str
    unit: str
    before: float
    after: float
    form: Callable[[float | None], str] = number
    mark: float | None = None
    interim: bool = False

    @property
    def change(self) -> str:
        """The change in the figure's own form, with its sign."""
        difference = self.after - self.before
        text = self.form(difference).replace(" %", " points")
        return ("+" if difference > 0 else "") + text


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
        ("score", f"The {reward_name(run)}'s score", f"as it says it; {scored} was trained on this", number, None),
        ("judge/positive", "Positive to the judge", "prompt + answer; a word lexicon no training saw", percent, human),
        ("judge/positive_response", "Answer alone positive", "share; the same judge on the answer only", percent, None),
        ("diversity/distinct2", "Variety, matched distinct-2", "new word pairs in equal amounts of text", number, None),
        ("diversity/unique", "Different answers", "share of answers that are not copies", percent, None),
        ("length", "Length", "tokens an answer", number, None),
        *_further_judges(run),
        ("eos_share", "Answers that end", "share that ends before the limit", percent, None),
    )  # fmt: skip
    found = {}
    for key, title, unit, form, mark in table:
        names = (f"{key}_{which}" for which in ("before", "after"))
        before, after = (figure(run, name if "/" in name else run.named(name)) for name in names)
        interim = before is None or after is None
        if interim:
            points = run.points(run.named(key))
            if len(points) < 2:
                continue
            before, after = points[0][1], points[-1][1]
            unit = "normalised" if key == "score" else unit
        found[key] = Comparison(key, title, unit, before, after, form, mark, interim)  # type: ignore[arg-type]
    kls, interim = run.points(run.named("kl")), not any(key.endswith("_after") for key in run.summary)
    kl = kls[-1][1] if interim and kls else figure(run, run.named("kl"))
    if kl is not None:
        found["kl"] = Comparison("kl", "Distance from the start (KL)", "nats a sequence", 0.0, kl, interim=interim)
    return found


def _further_judges(run: RunDir):
    """Rows of `comparisons` for the judges beside the lexicon; one that training learnt to please says so."""
    for key in (name.removesuffix("_before") for name in run.summary if name.startswith("judge/")):
        if f"{key}_before" in run.summary and key not in ("judge/positive", "judge/positive_response"):
            learnt = "; training has learnt to please it" if figure(run, f"{key}_trained_on") else ""
            yield key, f"Judge {key.removeprefix('judge/')}", f"mean score{learnt}", number, None


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
    """Whether the reward rose by more than noise: two standard errors of the difference, where they are known.

    In a run whose evaluation is to come, a twentieth of a standard score.
    """
    score = found.get("score")
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
    score, judge, kl = (found.get(key) for key in ("score", "judge/positive", "kl"))
    if score is None and judge is None:
        return _not_compared(run)
    parts, rose = [], score_rose(run, found)
    if judge is not None:
        share = f"{percent(judge.after)} of the answers to held-out prompts positive, before {percent(judge.before)}"
        parts.append(f"An independent judge, a word lexicon, calls {share}.")
    if score is not None:
        parts.append(f"The {reward_name(run)}'s score went from {number(score.before)} to {number(score.after)}.")
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


def _headline(run: RunDir, score: Comparison | None, judge: Comparison | None, rose: bool) -> str:
    if score is None:
        return f"Before and after {tuned_by(run)}"
    if not rose:
        return "The reward hardly rose" if score.after > score.before else "The reward did not rise"
    if judge is None:
        return "The reward rose"
    if judge.after < judge.before + JUDGE_NOISE:
        return "The reward rose, the judge sees no gain"
    return f"From {whole(judge.before)} to {whole(judge.after)} positive"


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
