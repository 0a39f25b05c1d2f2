"""The preference stage: a language model learns from pairs of answers, without a reward model."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
from ml_collections.config_dict import placeholder

from lfjax.config import Config, InputError, at_least, one_of, section
from lfjax.data.answer_batches import PairBatches
from lfjax.data.answers import Paired, drawn_pairs, paired_answers
from lfjax.data.duplicates import SPLITS
from lfjax.data.examples import is_judged, judged_texts
from lfjax.report.catalogue import Figure
from lfjax.rewards.intervals import SHARE, Bootstrap, Resampled
from lfjax.rewards.points import gap_of
from lfjax.run.data import Data, note
from lfjax.run.run import Run
from lfjax.run.sections import training as training_section
from lfjax.run.stage import LANGUAGE_MODEL, Stage, Step
from lfjax.stages.answers import reads_only, sources, train_on_answers
from lfjax.steps.preference import LOSSES, PER_TOKEN, REFERENCE_FREE
from lfjax.types import Answers

STEP = "lfjax.steps.preference:preference_step"


def preference_section() -> Config:
    """The keys of the stage."""
    return training_section(
        init_from="auto",  # stage or model folder; "auto": the last earlier stage that makes a language model
        reference=placeholder(str),  # stage or model folder; none: the model that it starts from
        keep_reference=True,  # ask the reference once, before training; else at every step, and hold it in memory
        seq_len=128,
        buckets=(32, 64, 128),  # sequence lengths, each compiled once
        dropout=0.0,
        ranking_pairs="all",  # of a ranking: "all" | "neighbours"
        pairs_per_answer=1,  # of an answer with a rating, drawn in every epoch among the answers to the same prompt
        min_gap=placeholder(float),  # rating points between the answers of a drawn pair; none: an eighth of the scale
        step=section(
            loss="sigmoid",  # DPO; robust, hinge, ipo, apo_zero, apo_down; without a reference: cpo, simpo, orpo
            beta=0.1,  # how strongly the reference holds; of orpo the weight of the odds
            label_smoothing=0.0,  # of sigmoid and robust: the share of preferences that are the wrong way round
            gamma=0.5,  # of simpo: target margin
            length_normalisation=0.0,  # log-probabilities are divided by tokens to this power; ipo, simpo, orpo: 1
            margin_scale=0.0,  # the chosen answer's reward has to lie this x margin (or rating gap) above
            sft_weight=0.0,  # of the chosen answer's likelihood
            num_microbatches=1,
            chunk_size=64,
        ),
    )


def check(config: Config) -> None:
    """Raises InputError where a value cannot be."""
    one_of(config, "preference.step.loss", tuple(LOSSES))
    one_of(config, "preference.ranking_pairs", ("all", "neighbours"))
    at_least(config, 0, "preference.min_gap", "preference.step.margin_scale", "preference.step.sft_weight")
    at_least(config, 1, "preference.pairs_per_answer", "preference.step.chunk_size")
    at_least(config, 1e-6, "preference.step.beta")
    for key, high in (("label_smoothing", 0.5), ("length_normalisation", None)):
        value = config.preference.step.get(key, 0.0)
        if not 0.0 <= value <= (high or 1.0) or value == high:
            raise InputError(
                f"config.preference.step.{key}: {value}; allowed: 0 up to{', not including, 0.5' if high else ' 1'}"
            )


def pairs_of(section: Config, records, tokenizer, scale: tuple[float, float]) -> Paired:
    """What a split holds."""
    options = {"max_length": section.seq_len + 1, "neighbours": section.ranking_pairs == "neighbours"}
    return paired_answers(records, tokenizer, scale=scale, **options)


def check_texts(config: Config, data: Data, tokenizer) -> None:
    """In each split there is a pair of answers that differ. Raises InputError."""
    section, scale = config.preference, data.rating_scale or (0.0, 1.0)
    for split in SPLITS:
        found = pairs_of(section, data.records[split], tokenizer, scale)
        gap = gap_of(section.min_gap, scale)
        if not found.given and not drawn_pairs(found.rated, np.random.default_rng(0), min_gap=gap, per_answer=1):
            raise InputError(
                f"config.preference.min_gap: {gap:g}; no two answers to one prompt in the {split} split are so many"
                f" rating points apart, and it holds no other pair ({found.counts['equal_pairs']} are equal once cut to"
                f" config.preference.seq_len = {section.seq_len}); lower it, or raise seq_len"
            )


def preference_stage(run: Run) -> dict[str, float]:
    """Trains from a language model; figures are of held-out pairs, in the order of implicit rewards."""
    step = run.config.preference.step
    sets, said = batches_of(run)
    found = train_on_answers(
        run,
        "preference",
        sets,
        figures_of=functools.partial(pair_figures, step),
        with_reference=lambda batch, ask: batch._replace(ref_logprobs=ask(Answers(*batch[:4]))),
        free=step.get("loss") in REFERENCE_FREE,
    )
    tell_both_fell(found, sets["test"])
    return found | said


def batches_of(run: Run) -> tuple[dict[str, PairBatches], dict[str, float]]:
    """(split -> batches, what is said of the data)."""
    section, scale = run.config.preference, run.data.rating_scale or (0.0, 1.0)
    gap = gap_of(section.min_gap, scale)
    rows = {"batch_size": section.batch_size, "buckets": tuple(section.buckets), "seed": run.config.seed}
    rows |= {"pad_id": run.tokenizer.pad_id, "min_gap": gap, "per_answer": section.pairs_per_answer}
    found = {s: pairs_of(section, run.records[s], run.tokenizer, scale) for s in SPLITS}
    counts = found["train"].counts
    if left := counts["equal_pairs"] + counts["empty"]:
        note("preference", f"{left} pairs of training answers are equal, equal once cut, or empty, and are left out")
    sets = {split: PairBatches(paired, **rows) for split, paired in found.items()}
    return sets, {
        "preference/cut_share": run.cut_share("preference", counts["cut"], counts["answers"]),
        "preference/train_equal_pairs": float(counts["equal_pairs"]),
        "preference/train_pairs": float(len(sets["train"].pairs)),
        "preference/pairs": float(len(sets["test"].pairs)),
    }


def pair_figures(step: Config, batches: PairBatches, sums: np.ndarray, prefix: str) -> dict[str, float]:
    """Of held-out pairs: implicit accuracy and margin of rewards, log-probabilities of both answers, nats.

    Args:
      sums: of the answers' log-probabilities under the policy.
    """
    free = step.get("loss") in REFERENCE_FREE or batches.ref is None
    lengths = np.array([len(answer.tokens) - answer.start for answer in batches.answers], np.float64)
    power = 1.0 if step.get("loss") in PER_TOKEN else step.get("length_normalisation", 0.0)
    rewards = step.get("beta", 1.0) * (sums - (0.0 if free else batches.ref)) / lengths**power
    chosen, rejected = (np.array([pair[side] for pair in batches.pairs]) for side in (0, 1))
    keys = [batches.answers[i].tokens[: batches.answers[i].start] for i in chosen]
    draws, gaps = Bootstrap(keys), rewards[chosen] - rewards[rejected]
    found: dict[str, Resampled] = {
        "margin": draws.mean(keys, gaps),
        "chosen_logprob": draws.mean(keys, sums[chosen]),
        "rejected_logprob": draws.mean(keys, sums[rejected]),
    }
    out = draws.mean(keys, np.heaviside(gaps, 0.5)).figures(f"{prefix}accuracy", SHARE)
    for name, figure in found.items():
        out |= figure.figures(f"{prefix}{name}")
    return out


def tell_both_fell(figures: Mapping[str, float], batches: PairBatches) -> None:
    """A note where training has made both answers of held-out pairs less likely than the reference has them."""
    if batches.ref is None:
        return
    sides = {"chosen": [p.chosen for p in batches.pairs], "rejected": [p.rejected for p in batches.pairs]}
    falls = {side: batches.ref[places].mean() - figures[f"preference/{side}_logprob"] for side, places in sides.items()}
    if min(falls.values()) > 0:
        note(
            "preference",
            f"held-out answers became less likely, chosen ones by {falls['chosen']:.2g} nats and rejected ones by"
            f" {falls['rejected']:.2g}: probability goes to what neither is; preference.step.sft_weight holds it",
        )


STAGE = Stage(
    name="preference",
    title="preference learning",
    summary="Preference learning without a reward model: DPO and its relatives",
    source="Rafailov et al. 2023, arXiv:2305.18290; IPO arXiv:2310.12036, APO arXiv:2408.06266, CPO arXiv:2401.08417,"
    " SimPO arXiv:2405.14734, ORPO arXiv:2403.07691",
    section=preference_section,
    check=check,
    check_texts=check_texts,
    steps={"preference": Step(STEP, "preference.step")},
    learns_from="preference, ranking, edit or rating",
    teaches=is_judged,
    splits=SPLITS,
    texts=judged_texts,
    sources=functools.partial(sources, stage="preference"),
    reads_only=functools.partial(reads_only, stage="preference"),
    held_out=("accuracy", "margin", "chosen_logprob"),
    makes=LANGUAGE_MODEL,
    figures={
        "preference/loss": Figure("Loss", "of pairs", "lower"),
        "preference/accuracy": Figure(
            "Implicit accuracy", "held-out pairs in people's order", "higher", form="percent"
        ),
        "preference/margin": Figure("Margin", "implicit reward, chosen less rejected", "higher"),
    },
    told="preference learning",
    run=preference_stage,
)
