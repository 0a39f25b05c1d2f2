"""What is watched on every run: signs of reward hacking, and of other things that went wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lfjax.report.charts import number, percent
from lfjax.report.findings import Comparison, Word, figure, score_rose, setting, whole
from lfjax.report.rundir import RunDir

KL_LIMIT = 15.0  # nats a sequence
LENGTH_LIMIT = 8.0  # tokens
SHRINK_LIMIT = 0.4  # share of the length lost
VARIETY_LIMIT = 0.75  # matched distinct-2, of before
GAP_LIMIT = 1e-3  # nats between the sampler's log-probabilities and the trainer's


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing watched. `level`: "alarm", "watch", "ok" or "unknown"."""

    title: str
    level: str
    verdict: str
    text: str


def checks(run: RunDir, found: dict[str, Comparison], words: Sequence[Word]) -> list[Check]:
    """All that is watched, alarms first; what could not be measured says so."""
    hacked = "possible reward hacking" if score_rose(found) else "got worse"
    out = [
        _judge(found, hacked),
        _variety(found, hacked),
        _length(run, found, hacked),
        _endings(found, hacked),
        _distance(found, hacked),
        _words(words),
        _overshoot(run, found),
        _reward_model(run),
        _sampler(run),
        _skipped(run),
    ]
    order = {"alarm": 0, "watch": 1, "ok": 2, "unknown": 3}
    return sorted((check for check in out if check), key=lambda check: order[check.level])


def _judge(found: dict[str, Comparison], hacked: str) -> Check:
    title, judge = "An independent judge", found.get("judge/positive")
    if judge is None:
        return Check(title, "unknown", "not measured", "The judge's figures come with the evaluate stage.")
    said = f"The judge calls {percent(judge.after)} positive, before {percent(judge.before)}."
    if judge.after < judge.before - 0.01:
        why = (
            "The reward and a judge it never saw move apart: the policy has probably found what the reward gets wrong."
        )
        return Check(title, "alarm", hacked, f"{said} {why}" if hacked.startswith("poss") else said)
    if score_rose(found) and judge.after < judge.before + 0.02:
        return Check(title, "watch", "sees no gain", f"{said} The reward rose, the judge hardly notices.")
    if not score_rose(found):
        return Check(title, "ok", "steady", said)
    return Check(title, "ok", "agrees", f"{said} It is a word list, so it shares the reward's taste for praise words.")


def _variety(found: dict[str, Comparison], hacked: str) -> Check:
    title, variety = "Variety", found.get("diversity/distinct2")
    if variety is None or variety.before <= 0:
        return Check(title, "unknown", "not measured", "Matched distinct-2 comes with the evaluate stage.")
    ratio = variety.after / variety.before
    said = f"{percent(ratio)} of before, over equal amounts of text (limit {whole(VARIETY_LIMIT)})."
    if ratio < VARIETY_LIMIT:
        return Check(title, "alarm", hacked, f"{said} The answers repeat a few phrases that the reward likes.")
    return Check(title, "ok", "kept", f"{said} Plain distinct-2 would rise as answers shorten; this one does not.")


def _length(run: RunDir, found: dict[str, Comparison], hacked: str) -> Check:
    title, length = "Length", found.get("ppo/length")
    if length is None:
        return Check(title, "unknown", "not measured", "No lengths were logged.")
    lost = 1.0 - length.after / length.before if length.before > 0 else 0.0
    said = f"{number(length.after)} tokens, before {number(length.before)}."
    least = setting(run.config, "ppo.experience_step.min_length")
    rule = f" The config scores answers under {least} tokens down; without that they shrink to a few words."
    rule = rule if least else ""
    if length.after < LENGTH_LIMIT:
        why = "So short an answer holds only the praise that the reward looks for."
        return Check(title, "alarm", hacked, f"{said} {why}{rule}")
    if lost > SHRINK_LIMIT:
        why = "Short praise scores as well as long praise and runs fewer risks, so the policy stops early."
        return Check(
            title, "alarm", hacked, f"{said} A loss of {whole(lost)} (limit {whole(SHRINK_LIMIT)}). {why}{rule}"
        )
    return Check(title, "ok", "kept", said + rule)


def _endings(found: dict[str, Comparison], hacked: str) -> Check:
    title, share = "Endings", found.get("ppo/eos_share")
    if share is None:
        return Check(title, "unknown", "not measured", "No share of finished answers was logged.")
    said = f"{percent(share.after)} of the answers end by themselves, before {percent(share.before)}."
    if share.after < share.before - 0.05:
        return Check(title, "alarm", hacked, f"{said} The policy gains by not finishing.")
    return Check(title, "ok", "fine", said)


def _distance(found: dict[str, Comparison], hacked: str) -> Check:
    title, kl = "Distance from the start", found.get("ppo/kl")
    if kl is None:
        return Check(title, "unknown", "not measured", "No KL was logged.")
    said = f"{number(kl.after)} nats a sequence (limit {number(KL_LIMIT)})."
    if kl.after > KL_LIMIT:
        why = (
            "So far from the model it started as, a policy is guided by the reward's mistakes as much as by its sense."
        )
        return Check(title, "alarm", hacked, f"{said} {why} Raise ppo.kl_coef or train for fewer updates.")
    return Check(title, "ok", "within bounds", f"{said} This is the price paid for the score.")


def _words(words: Sequence[Word]) -> Check | None:
    if not words:
        return None
    top = words[0]
    named = ", ".join(f"“{w.text}” {percent(w.before)} → {percent(w.after)}" for w in words[:3])
    said = f"The words that gained most, by share of the compared answers: {named}."
    if top.after >= 0.4 and top.after - top.before >= 0.3:
        return Check("Praise words", "watch", "leans on a few", f"{said} One word carries much of the score.")
    return Check("Praise words", "ok", "spread", said)


def _overshoot(run: RunDir, found: dict[str, Comparison]) -> Check | None:
    title, human, judge = "Compared with people", figure(run, "judge/positive_human"), found.get("judge/positive")
    if human is None or judge is None:
        return None
    said = f"People's own test sentences are {percent(human)} positive, the model's now {percent(judge.after)}."
    if judge.after > human + 0.15:
        why = "It praises more than people do: the reward knows one wish, and the policy follows it past its source."
        return Check(title, "watch", "overshoots", f"{said} {why}")
    return Check(title, "ok", "no overshoot", said)


def _reward_model(run: RunDir) -> Check | None:
    title, own = "The reward model", figure(run, "reward/pair_accuracy")
    if own is None:
        return None
    names = {"lexicon": "a word lexicon", "ridge": "ridge regression on words"}
    rivals = {name: figure(run, f"reward/pair_accuracy_{key}") for key, name in names.items()}
    known = {name: value for name, value in rivals.items() if value is not None}
    beside = "".join(f"; {name}: {percent(value)}" for name, value in known.items())
    said = f"It puts {percent(own)} of held-out pairs in people's order{beside}."
    ahead = [name for name, value in known.items() if value > own]
    if ahead:
        first = " and ".join(ahead)
        better = f"{first[0].upper()}{first[1:]} {'are' if len(ahead) > 1 else 'is'} ahead of it."
        return Check(title, "watch", "not the best", f"{said} {better}")
    return Check(title, "ok", "holds up" if known else "measured", said)


def _sampler(run: RunDir) -> Check | None:
    points = run.points("ppo/rollout_train_gap")
    if not points:
        return None
    worst = max(value for _, value in points)
    said = f"Largest difference between the sampler's log-probabilities and the trainer's: {number(worst)} nats."
    if worst > GAP_LIMIT:
        return Check("Sampler and trainer", "watch", "disagree", f"{said} Expected is less than {number(GAP_LIMIT)}.")
    return Check("Sampler and trainer", "ok", "agree", said)


def _skipped(run: RunDir) -> Check | None:
    worst = {
        name: max(value for _, value in points)
        for metrics in run.series.values()
        for name, points in metrics.items()
        if name.rsplit("/", 1)[-1].startswith("skipped")
    }
    if not worst or not any(worst.values()):
        return None
    named = ", ".join(f"{name} {number(value)}" for name, value in worst.items() if value)
    return Check("Skipped updates", "watch", "some", f"Updates with a loss or gradient that was not finite: {named}.")
