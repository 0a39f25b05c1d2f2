"""What the metrics are called, in which unit they are and which of them share a chart; unknown ones get their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from lfjax.report.charts import Mark, number, percent


@dataclasses.dataclass(frozen=True)
class Entry:
    """How one metric is shown. `better`: "lower", "higher" or "" (neither); `noisy`: worth a moving mean;
    `log`: a logarithmic axis where the values span more than a factor of 20."""

    title: str
    unit: str = ""
    better: str = ""
    form: Callable[[float | None], str] = number
    marks: tuple[Mark, ...] = ()
    noisy: bool = True
    log: bool = False


BY_NAME = {
    "reward/loss": Entry("Loss", "sum of the losses on ratings and pairs", "lower", log=True),
    "reward/mse": Entry("Squared error", "rating points, squared", "lower"),
    "classify/loss": Entry("Loss", "nats a text", "lower", log=True),
    "ppo/score": Entry("Score", "normalised, after the rules on length and end", "higher"),
    "ppo/raw_score": Entry("Raw score", "as the reward says it", "higher"),
    "ppo/kl": Entry("KL from the start", "nats a sequence", marks=(Mark(15.0, "limit 15"),)),
    "ppo/length": Entry("Length", "tokens a response", marks=(Mark(8.0, "limit 8"),)),
    "optim/learning_rate": Entry("Learning rate", noisy=False),
    "optim/grad_norm": Entry("Gradient norm", "before clipping", log=True),
}
BY_LEAF = {
    "loss": Entry("Loss", "nats a token", "lower", log=True),
    "perplexity": Entry("Perplexity", "held-out texts", "lower", log=True),
    "bits_per_byte": Entry("Bits per byte", "held-out texts", "lower"),
    "pair_accuracy": Entry("Pair accuracy", "pairs in people's order", "higher", percent),
    "calibration_error": Entry("Calibration error", "|odds said - pairs so ordered|; 0 is best", "lower", percent),
    "accuracy": Entry("Accuracy", "texts whose class was told", "higher", percent),
    "f1": Entry("F1", "mean over the classes", "higher", percent),
    "precision": Entry("Precision", "mean over the classes", "higher", percent),
    "recall": Entry("Recall", "mean over the classes", "higher", percent),
    "rating_slope": Entry("Rating points a point of score", "1: scores are in rating points"),
    "ranked_pair_accuracy": Entry("Ranked pair accuracy", "pairs in people's order", "higher", percent),
    "entropy": Entry("Entropy", "nats a token"),
    "clip_fraction": Entry("Clip fraction", "tokens whose ratio was clipped", "", percent),
    "value_clip_fraction": Entry("Value clip fraction", "tokens whose value moved further than its clip", "", percent),
    "explained_variance": Entry("Explained variance", "of the returns, by the value network; 1 is best", "higher"),
    "eos_share": Entry("Answers that end", "share", "", percent),
    "rollout_train_gap": Entry("Sampler's gap", "nats, largest difference of log-probabilities", "lower", log=True),
    "policy_loss": Entry("Policy loss"),
    "value_loss": Entry("Value loss", "", "lower", log=True),
    "kl_coef": Entry("KL coefficient", noisy=False),
    "approx_kl": Entry("KL of the update", "nats a token, from the rollout's policy"),
    "ratio": Entry("Mean probability ratio", "1 before the first step"),
    "ratio_variance": Entry("Variance of the ratio", "around 1", log=True),
    "first_ratio_error": Entry("First ratio error", "|ratio − 1| before the first step", "lower"),
    "return": Entry("Return", "score less the KL term"),
    "value": Entry("Value", "mean over tokens"),
    "positive": Entry("Positive to the judge", "share", "higher", percent),
    "distinct2": Entry("Matched distinct-2", "", "higher"),
    "skipped": Entry("Skipped updates", "not finite"),
    "tokens_per_s": Entry("Speed", "tokens a second", "higher"),
}
VARIANTS = {"validation": "held out", "val": "held out", "heldout": "held out", "test": "test", "train": "training"}
ORDER = [*BY_NAME, *BY_LEAF]


def family(name: str) -> tuple[str, str]:
    """(the chart's key, the line's label): "reward/validation_mse" belongs to "reward/mse" as "held out"."""
    head, _, leaf = name.rpartition("/")
    for mark, label in VARIANTS.items():
        for rest in (leaf.removeprefix(f"{mark}_"), leaf.removesuffix(f"_{mark}")):
            if rest != leaf and rest:
                return (f"{head}/{rest}" if head else rest), label
    return name, "training"


def entry(key: str) -> Entry:
    """What is known of a chart's metric; an unknown one is shown under its own name."""
    stage, _, leaf = key.rpartition("/")
    figure, _, of_class = leaf.partition("_")
    if stage == "classify" and of_class and figure in ("f1", "precision", "recall"):
        return dataclasses.replace(BY_LEAF[figure], title=f"{BY_LEAF[figure].title}: {of_class}", unit="of this class")
    return BY_NAME.get(key) or BY_LEAF.get(leaf) or Entry(leaf.replace("_", " ").capitalize() or key)


def sort_key(key: str) -> tuple[int, str]:
    """Known metrics first, in reading order; optimiser and timing figures late; unknown ones last, by name."""
    known = next((i for i, name in enumerate(ORDER) if name in (key, key.rpartition("/")[2])), len(ORDER))
    late = 1000 if key.startswith("optim/") else 2000 if key.endswith("tokens_per_s") else 0
    return known + late, key


def families(names: Iterable[str]) -> dict[str, list[tuple[str, str]]]:
    """chart key -> [(metric name, line label)], in reading order."""
    charts: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        key, label = family(name)
        charts.setdefault(key, []).append((name, label))
    return {key: sorted(charts[key], key=lambda pair: pair[1] != "training") for key in sorted(charts, key=sort_key)}
