"""What metrics are called, in which unit they are and which of them share a chart; unknown ones get their own.

A stage says what its own metrics are called; here are the leaves that methods share, such as loss, kl and entropy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from lfjax.report.charts import number, percent

FORMS: dict[str, Callable[[float | None], str]] = {"number": number, "percent": percent}


@dataclasses.dataclass(frozen=True)
class Figure:
    """How one metric is shown.

    Attributes:
      better: "lower", "higher" or "" (neither). form: a name in `FORMS`.
      marks: (value, label) of lines across its chart.
      noisy: worth a moving mean. log: a logarithmic axis where the values span more than a factor of 20.
    """

    title: str
    unit: str = ""
    better: str = ""
    form: str = "number"
    marks: tuple[tuple[float, str], ...] = ()
    noisy: bool = True
    log: bool = False


Figures = Mapping[str, Figure]

SHARED = {
    "optim/learning_rate": Figure("Learning rate", noisy=False),
    "optim/grad_norm": Figure("Gradient norm", "before clipping", log=True),
}
BY_LEAF = {
    "loss": Figure("Loss", "nats a token", "lower", log=True),
    "perplexity": Figure("Perplexity", "held-out texts", "lower", log=True),
    "bits_per_byte": Figure("Bits per byte", "held-out texts", "lower"),
    "pair_accuracy": Figure("Pair accuracy", "pairs in people's order", "higher", "percent"),
    "calibration_error": Figure("Calibration error", "|odds said - pairs so ordered|; 0 is best", "lower", "percent"),
    "accuracy": Figure("Accuracy", "texts whose class was told", "higher", "percent"),
    "f1": Figure("F1", "mean over the classes", "higher", "percent"),
    "precision": Figure("Precision", "mean over the classes", "higher", "percent"),
    "recall": Figure("Recall", "mean over the classes", "higher", "percent"),
    "rating_slope": Figure("Rating points a point of score", "1: scores are in rating points"),
    "ranked_pair_accuracy": Figure("Ranked pair accuracy", "pairs in people's order", "higher", "percent"),
    "entropy": Figure("Entropy", "nats a token"),
    "clip_fraction": Figure("Clip fraction", "tokens whose ratio was clipped", "", "percent"),
    "value_clip_fraction": Figure(
        "Value clip fraction", "tokens whose value moved further than its clip", "", "percent"
    ),
    "explained_variance": Figure("Explained variance", "of the returns, by the value network; 1 is best", "higher"),
    "eos_share": Figure("Answers that end", "share", "", "percent"),
    "rollout_train_gap": Figure("Sampler's gap", "nats, largest difference of log-probabilities", "lower", log=True),
    "policy_loss": Figure("Policy loss"),
    "value_loss": Figure("Value loss", "", "lower", log=True),
    "kl_coef": Figure("KL coefficient", noisy=False),
    "approx_kl": Figure("KL of the update", "nats a token, from the rollout's policy"),
    "ratio": Figure("Mean probability ratio", "1 before the first step"),
    "ratio_variance": Figure("Variance of the ratio", "around 1", log=True),
    "first_ratio_error": Figure("First ratio error", "|ratio − 1| before the first step", "lower"),
    "return": Figure("Return", "score less the KL term"),
    "value": Figure("Value", "mean over tokens"),
    "unique": Figure("Different answers", "share", "", "percent"),
    "positive": Figure("Positive to the judge", "share", "higher", "percent"),
    "distinct2": Figure("Matched distinct-2", "", "higher"),
    "skipped": Figure("Skipped updates", "not finite"),
    "tokens_per_s": Figure("Speed", "tokens a second", "higher"),
}
VARIANTS = {"validation": "held out", "val": "held out", "heldout": "held out", "test": "test", "train": "training"}
PER_CLASS = ("f1", "precision", "recall")  # leaves that a class may follow


def family(name: str) -> tuple[str, str]:
    """(the chart's key, the line's label): "reward/validation_mse" belongs to "reward/mse" as "held out"."""
    head, _, leaf = name.rpartition("/")
    for mark, label in VARIANTS.items():
        for rest in (leaf.removeprefix(f"{mark}_"), leaf.removesuffix(f"_{mark}")):
            if rest != leaf and rest:
                return (f"{head}/{rest}" if head else rest), label
    return name, "training"


def entry(key: str, figures: Figures) -> Figure:
    """What is known of a chart's metric; an unknown one is shown under its own name.

    Args:
      figures: those of the run's stages.
    """
    leaf = key.rpartition("/")[2]
    figure, _, of_class = leaf.partition("_")
    if of_class and figure in PER_CLASS and key not in figures:
        return dataclasses.replace(BY_LEAF[figure], title=f"{BY_LEAF[figure].title}: {of_class}", unit="of this class")
    known = figures.get(key) or SHARED.get(key) or BY_LEAF.get(leaf)
    return known or Figure(leaf.replace("_", " ").capitalize() or key)


def form_of(name: str, figures: Figures) -> Callable[[float | None], str]:
    """How a figure of summary.json is written: as the metric whose name it begins with, "positive" of positive_after.

    Shares won are percent.
    """
    head, _, leaf = name.rpartition("/")
    leaf = next((rest for mark in VARIANTS if (rest := leaf.removeprefix(f"{mark}_")) != leaf), leaf)
    parts = leaf.split("_")
    known = ["_".join(parts[:count]) for count in range(len(parts), 0, -1)]
    known += ["_".join(parts[first:]) for first in range(1, len(parts))]  # of a judge: ridge_pair_accuracy
    found = (figures.get(f"{head}/{part}") or BY_LEAF.get(part) for part in known)
    return percent if leaf.endswith("_won") else FORMS[next(filter(None, found), Figure("")).form]


def sort_key(key: str, figures: Figures) -> tuple[int, str]:
    """Known metrics first, in reading order; optimiser and timing figures late; unknown ones last, by name."""
    order = [*figures, *SHARED, *BY_LEAF]
    known = next((i for i, name in enumerate(order) if name in (key, key.rpartition("/")[2])), len(order))
    late = 1000 if key.startswith("optim/") else 2000 if key.endswith("tokens_per_s") else 0
    return known + late, key


def families(names: Iterable[str], figures: Figures) -> dict[str, list[tuple[str, str]]]:
    """chart key -> [(metric name, line label)], in reading order."""
    charts: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        key, label = family(name)
        charts.setdefault(key, []).append((name, label))
    ordered = sorted(charts, key=lambda key: sort_key(key, figures))
    return {key: sorted(charts[key], key=lambda pair: pair[1] != "training") for key in ordered}
