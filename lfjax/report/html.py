"""Puts a run's figures, charts and samples on one page. Everything from the run is escaped."""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import html
import itertools
import os
import pathlib
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lfjax import files
from lfjax.report import catalogue, findings, rundir
from lfjax.report import checks as watching
from lfjax.report.catalogue import Figure
from lfjax.report.charts import Line, Mark, bar, clock, dumbbell, line_chart, number, percent, smooth
from lfjax.report.checks import KL_LIMIT, Check
from lfjax.report.findings import Comparison, Word
from lfjax.report.rundir import RunDir, Stage, is_figure
from lfjax.report.style import CSS, SCRIPT
from lfjax.terminal import note, visible

PAIRS_SHOWN = 8  # the others are behind a click
MOST_TEXT, MOST_SAMPLE = 2000, 20_000  # characters of a text, of a sample's
MOST_NAME, MOST_SETTINGS = 200, 5000  # characters of a setting's name, settings of a config
MOST_CHARTS, MOST_PAIRS, MOST_TABLE = 3_000_000, 800_000, 200_000  # bytes of a page of less than 5 MB
SMOOTHED_FROM = 40  # points from which a moving mean is drawn over the raw curve
PILL = {"alarm": "⚠ ", "watch": "", "ok": "✓ ", "unknown": ""}


def build(workdir: str | os.PathLike, known: rundir.Known | None = None) -> pathlib.Path:
    """Writes WORKDIR/report.html from the files of the run directory; a run under way gives a partial report.

    What cannot be read is left out; the page and a line on stderr say so.

    Args:
      known: (config) -> what `stages.json` would hold, for a directory that has none.
    Returns:
      The report's path. The file needs nothing else: no script, style, font or picture from elsewhere.
    Raises:
      InputError: not a run directory, nothing in it can be read, or the report cannot be written.
    """
    run = rundir.read(workdir, known)
    path = pathlib.Path(workdir) / "report.html"
    files.write_bytes(path, page(run).encode("utf-8", "replace"))
    for line in run.left_out:
        note(f"note: left out of the report: {line}")
    return path


def page(run: RunDir) -> str:
    """The whole document."""
    found = findings.comparisons(run)
    pairs = findings.sample_pairs(run.samples)
    words = findings.risen_words(pairs)
    checks = watching.checks(run, found, words)
    charts: list[str] = []
    for stage in run.series:
        charts.append(_stage_charts(run, stage, MOST_CHARTS - sum(map(_bytes, charts))))
    body = (
        _head(run, found, checks),
        _comparison_table(run, found),
        _checks(run, checks),
        _pairs(pairs),
        _frontier(run, words),
        *charts,
        _time(run),
        _everything(run),
    )
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script}'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_e(run.name)}: run report</title><style>{CSS}</style></head><body><main>"
        f"{''.join(body)}<footer>Made by lfjax from the files of this run directory alone.</footer></main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff\U00010800-\U00010fff\U0001e800-\U0001efff]")


def _shown(text: Any, most: int = MOST_TEXT) -> str:
    """At most so many characters of a text as others wrote it.

    Control characters become their visible pictures or escapes, and letters that are written from right to left turn
    nothing around that is not their own.
    """
    text = str(text)
    if len(text) > most:
        text = f"{text[:most]}… ({number(len(text) - most)} more characters)"
    text = visible(text.translate(_PICTURES)).encode("utf-8", "replace").decode()
    return f"\u2068{text}\u2069" if _RIGHT_TO_LEFT.search(text) else text


def _e(text: Any, most: int = MOST_TEXT) -> str:
    """As `_shown`, escaped for text and attributes."""
    return html.escape(_shown(text, most), quote=True)


def _bytes(text: str) -> int:
    return len(text.encode())


def _within(blocks: Iterable[str], most: int) -> list[str]:
    """The blocks from the first on, as far as they have at most so many bytes together."""
    kept, size = [], 0
    for block in blocks:
        size += _bytes(block)
        if size > most:
            break
        kept.append(block)
    return kept


def _more(count: int, what: str) -> str:
    return f'<p class="note">{number(count)} more {what} are left out.</p>' if count else ""


def _section(title: str, content: str, intro: str = "") -> str:
    lead = f'<p class="soft">{intro}</p>' if intro else ""
    return f"<section><h2>{title}</h2>{lead}{content}</section>"


def _head(run: RunDir, found: dict[str, Comparison], checks: Sequence[Check]) -> str:
    headline, text = findings.verdict(run, found, sum(check.level == "alarm" for check in checks))
    marks = {"done": "done", "started": "under way or stopped", "missing": "not run yet"}
    stages = "".join(
        f'<li class="{s.state}">{_e(s.name)}{"" if s.state == "done" else f" ({marks[s.state]})"}</li>'
        for s in run.stages
    )
    missing = [stage.name for stage in run.stages if stage.state != "done"]
    partial = (
        f'<p class="note">The run is not complete. Missing: {_e(", ".join(missing))}. '
        "The same train command goes on where it stopped.</p>"
        if missing
        else ""
    )
    seed = run.config.get("seed")
    about = f"Run report · <b>{_e(run.name)}</b>" + ("" if seed is None else f" · seed {_e(seed)}")
    unread = "".join(f'<p class="note">Left out: {_e(line)}.</p>' for line in run.left_out)
    return (
        f'<header><div class="eyebrow">{about}</div><h1>{_e(headline)}</h1><p class="lead">{_e(text)}</p>'
        f'<p class="note">{_e(findings.what_it_is(run))}</p>{partial}{unread}<ul class="stages">{stages}</ul></header>'
    )


def _comparison_table(run: RunDir, found: dict[str, Comparison]) -> str:
    if not found:
        return _section("What was learned", _foundation(run)) if _foundation(run) else ""
    rows = "".join(_comparison_row(item) for item in found.values())
    columns = "".join(f'<th class="num">{name}</th>' for name in ("Before", "After", "Change"))
    head = f"<tr><th>Figure</th>{columns}<th></th></tr>"
    human = run.summary.get("judge/positive_human")
    intro = (
        f"The same held-out prompts, the same sampling noise, the model before {_e(findings.tuned_by(run))} and after."
    )
    if any(item.interim for item in found.values()):
        intro = "Figures marked “training” are of the first and the last logged batch, not of held-out prompts."
    if any(around.low is not None for item in found.values() for around in item.around):
        intro += (
            " In brackets 95 % intervals, by drawing prompts again, and n, the number of answers; changes are of the"
            " same prompts."
        )
    if isinstance(human, (int, float)):
        intro += f" The dashed tick marks people's own test sentences: {percent(human)} positive."
    table = f'<div class="card compare"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'
    return _section("Before and after", table + _foundation(run), intro)


def _comparison_row(item: Comparison) -> str:
    unit = item.unit + (" · training" if item.interim else "")
    low, high = (0.0, 1.0) if item.form is percent else _span(item)
    before, after = ("0" if item.key == "kl" else item.said("before")), item.said("after")
    change = "" if item.key == "kl" else item.change
    return (
        f'<tr><th scope="row">{_e(item.title)}<small>{_e(unit)}</small></th>'
        f'<td class="num before" data-label="before">{before}</td>'
        f'<td class="num after" data-label="after">{after}</td>'
        f'<td class="num soft" data-label="change">{change}</td>'
        f'<td class="shape">{dumbbell(item.before, item.after, low, high, item.mark)}</td></tr>'
    )


def _span(item: Comparison) -> tuple[float, float]:
    low, high = min(item.before, item.after, 0.0), max(item.before, item.after)
    return low * 1.1, high * 1.1 or 1.0


def _foundation(run: RunDir) -> str:
    """The language model and the reward model under it, in one sentence each."""
    parts = []
    for stage in (stage.name for stage in run.stages):
        figure, said = functools.partial(findings.figure, run), functools.partial(findings.said, run)
        perplexity, accuracy = figure(f"{stage}/perplexity"), figure(f"{stage}/pair_accuracy")
        if perplexity and run.about(stage).builds:
            bits, unigram = figure(f"{stage}/bits_per_byte"), figure(f"{stage}/unigram_perplexity")
            size = f", {number(bits)} bits a byte" if bits else ""
            beside = f"; guessing by word frequency alone reaches {number(unigram)}" if unigram else ""
            parts.append(
                f"<b>Language model:</b> perplexity {said(f'{stage}/perplexity')} on held-out texts{size}{beside}."
            )
        elif perplexity:
            before = figure(f"{stage}/perplexity_before")
            was = f", {number(before)} before" if before else ""
            alike = findings.interval(run, f"{stage}/perplexity_change").seen is False
            was += "; no difference seen" if was and alike else ""
            parts.append(f"<b>Fine-tuned:</b> perplexity {said(f'{stage}/perplexity')} on held-out answers{was}.")
        if accuracy:
            asked = figure(f"{stage}/min_gap") or findings.setting(run.config, f"{stage}.min_gap")
            gap = asked if figure(f"{stage}/pairs") else None
            apart = f" at least {number(gap)} rating point{'s' * (gap != 1)} apart" if gap and is_figure(gap) else ""
            share = said(f"{stage}/pair_accuracy", percent)
            parts.append(f"<b>Reward model:</b> orders {share} of held-out pairs{apart} as people do.")
        if figure(f"{stage}/majority_accuracy") is not None and figure(f"{stage}/accuracy") is not None:
            told, often = (said(f"{stage}/{name}", percent) for name in ("accuracy", "majority_accuracy"))
            alike = findings.interval(run, f"{stage}/accuracy_over_majority").seen is False
            more = "; no difference seen" if alike else ""
            parts.append(
                f"<b>Classifier:</b> right about {told} of held-out texts; the most frequent class: {often}{more}."
            )
    return "".join(f'<p class="small soft" style="margin:14px 0 0">{part}</p>' for part in parts)


def _checks(run: RunDir, checks: Sequence[Check]) -> str:
    if all(check.level == "unknown" for check in checks):
        return ""
    items = "".join(
        f'<li class="{c.level}"><div><h3>{_e(c.title)}</h3>'
        f'<span class="pill {c.level}">{PILL[c.level]}{_e(c.verdict)}</span></div><p>{_e(c.text)}</p></li>'
        for c in checks
    )
    watched = f'<ul class="checks card">{items}</ul>'
    if not run.scored:
        return _section("What was watched", watched, "The limits are fixed beforehand.")
    intro = (
        "A policy trained on a score finds whatever the score overlooks. A rising score with a falling independent "
        "figure is the sign of it, so these are compared on every run; the limits are fixed beforehand."
    )
    return _section("Watched for reward hacking", watched, intro)


def _pairs(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    if not pairs:
        return ""
    blocks = _within(
        (
            f'<div class="pair">{_sample(before, "before", "Before")}{_sample(after, "is-after", "After")}</div>'
            for before, after in pairs
        ),
        MOST_PAIRS,
    )
    shown = f'<div class="pairs card">{"".join(blocks[:PAIRS_SHOWN])}</div>'
    more = blocks[PAIRS_SHOWN:]
    rest = (
        f'<details><summary>{len(more)} more</summary><div class="pairs card">{"".join(more)}</div></details>'
        if more
        else ""
    )
    intro = "Held-out prompts in the order of the file, none picked; the prompt is grey, the model wrote the rest."
    rest += _more(len(pairs) - len(blocks), "pairs")
    return _section("The same prompts, before and after", shown + rest, intro)


def _sample(row: dict[str, Any], kind: str, tag: str) -> str:
    names = (("score", "score"), ("normalised_score", "normalised score"), ("judge", "judge"), ("kl", "KL"),
             ("length", "tokens"))  # fmt: skip
    figures = "".join(
        f"<span>{label} <b>{number(row[key])}</b></span>" for key, label in names if is_figure(row.get(key))
    )
    prompt, answer = (_e(row.get(key) or "", MOST_SAMPLE) for key in ("prompt", "response"))
    answer = answer if answer.strip() else '<span class="soft">(nothing)</span>'
    return (
        f'<div class="{kind}"><p class="tag">{tag}</p><p class="text" dir="auto"><span class="prompt">{prompt}</span>'
        f'<span class="answer">{answer}</span></p><div class="figures">{figures}</div></div>'
    )


def _frontier(run: RunDir, words: Sequence[Word]) -> str:
    """Score against KL over the updates, and the words that gained."""
    scores, kls = (dict(run.points(run.named(leaf))) for leaf in ("score", "kl"))
    steps = sorted(scores.keys() & kls.keys())
    card = _word_card(words) if words else ""
    if len(steps) < 2:
        return _section("The words that gained", f'<div class="two">{card}</div>') if words else ""
    points = [(kls[step], scores[step]) for step in steps]
    chart = line_chart(
        [Line("score", points, "path", dots=True)],
        label="Score against KL, one point an update",
        x_label="KL from the start, nats a sequence",
        marks=[Mark(KL_LIMIT, "limit 15", "x")] if max(kls.values()) > 0.6 * KL_LIMIT else [],
        log=False,
        path_ends=(f"update {steps[0]}", f"update {steps[-1]}"),
    )
    unit = "normalised score; one point a logged update"
    cards = _figure("Score against distance", chart, unit, number(points[-1][1])) + card
    intro = (
        "Every point of score is paid for in KL, the distance from the model before"
        f" {_e(run.about(run.scored).title)}. Where the curve flattens, further updates buy distance without score."
    )
    title = "What the score cost" + (", and the words that gained" if words else "")
    return _section(title, f'<div class="two">{cards}</div>', intro)


def _word_card(words: Sequence[Word]) -> str:
    rows = "".join(
        f'<tr><td>{_e(word.text)}</td><td class="bars">{bar(word.before, style="was")}{bar(word.after)}</td>'
        f'<td class="num">{percent(word.before)} → {percent(word.after)}</td></tr>'
        for word in words
    )
    return (
        '<figure class="card words"><figcaption><h3>Words that gained most</h3></figcaption>'
        '<p class="unit">share of the compared answers that hold the word, before (grey) and after</p>'
        f'<div class="scroll"><table><tbody>{rows}</tbody></table></div></figure>'
    )


def _figure(title: str, chart: str, unit: str, last: str, legend: str = "") -> str:
    return (
        f'<figure class="card"><figcaption><h3>{_e(title)}</h3><span class="last">{last}</span></figcaption>'
        f'<div class="unit"><span>{_e(unit)}</span>{legend}</div>{chart}</figure>'
    )


def _stage_charts(run: RunDir, stage: str, most: int) -> str:
    """A chart for every metric of the stage with at least two points, as far as they have at most `most` bytes.

    Single figures are in the list of all figures.
    """
    metrics = dict(run.series[stage])
    speed = [(int(r["step"]), float(r["tokens_per_s"])) for r in run.timing.get(stage, ()) if r.get("tokens_per_s")]
    if len(speed) > 1:
        metrics["timing/tokens_per_s"] = speed
    families = catalogue.families((name for name, points in metrics.items() if len(points) > 1), run.figures)
    if not families:
        return ""
    charts = [chart for key, names in families.items() for chart in _alike(run, key, names)]
    cards = _within(
        (
            _chart_card(key, shown, [(label, metrics[name]) for name, label in names], marks)
            for key, shown, names, marks in charts
        ),
        most,
    )
    steps = max(points[-1][0] for points in metrics.values())
    intro = f"{number(steps)} {_e(run.about(stage).unit)}. Touch or point at a curve to read it."
    shown = f'<div class="charts">{"".join(cards)}</div>' + _more(len(charts) - len(cards), "charts")
    return _section(f"Curves: {_e(stage)}", shown, intro)


def _alike(
    run: RunDir, key: str, names: list[tuple[str, str]]
) -> Iterator[tuple[str, Figure, list[tuple[str, str]], list[Mark]]]:
    """The charts of a metric: its own figure, lines and marks of each.

    Simpler methods are measured on held-out data: where they are known, they are drawn beside the held-out curve alone,
    and the one of the training batches has a chart of its own.
    """
    shown, rivals = catalogue.entry(key, run.figures), _baselines(run, key)
    held_out = [(name, label) for name, label in names if label != "training"]
    if not rivals or not held_out:
        own = f"{shown.unit} · training batches".lstrip(" ·") if rivals else shown.unit
        yield key, dataclasses.replace(shown, unit=own), names, []
        return
    yield key, dataclasses.replace(shown, title=f"{shown.title}, held out"), held_out, rivals
    if training := [(name, label) for name, label in names if label == "training"]:
        yield key, dataclasses.replace(shown, title=f"{shown.title}, training batches"), training, []


def _baselines(run: RunDir, key: str) -> list[Mark]:
    """What simpler methods reach on the validation data ("reward/validation_pair_accuracy_ridge"), else the test data.

    The curve of a metric is of the validation data.
    """
    head, _, leaf = key.rpartition("/")
    marks = []
    for name in ("ridge", *(["lexicon"] if findings.lexicon_judges(run) else [])):
        places = ((f"{head}/validation_{leaf}_{name}", name), (f"{key}_{name}", f"{name}, test"))
        known = ((run.summary.get(place), label) for place, label in places)
        marks += [Mark(float(v), label) for v, label in known if isinstance(v, (int, float))][:1]
    return marks


def _chart_card(
    key: str, shown: Figure, named: list[tuple[str, list[tuple[int, float]]]], baselines: list[Mark]
) -> str:
    form = catalogue.FORMS[shown.form]
    styles = ("main", "second", "third")
    lines = []
    for (label, points), style in zip(named, styles, strict=False):
        if style == "main" and shown.noisy and len(points) >= SMOOTHED_FROM:
            lines.append(Line(f"{label} (raw)", points, "faint"))
            lines.append(Line(label, smooth(points), style))
        else:
            lines.append(Line(label, points, style, dots=len(points) <= 12))
    legend = ""
    if len(named) > 1:
        keys = "".join(f'<span><i class="{s}"></i>{_e(n)}</span>' for (n, _), s in zip(named, styles, strict=False))
        legend = f'<span class="legend">{keys}</span>'
    marks = [*(Mark(value, _shown(label)) for value, label in shown.marks), *baselines]
    chart = line_chart(lines, label=_shown(shown.title), marks=marks, form=form, log=shown.log)
    unit = shown.unit + (f" · {shown.better} is better" if shown.better else "")
    last = " · ".join(form(points[-1][1]) for _, points in named[:3])
    return _figure(shown.title, chart, unit or key, last, legend)


def _time(run: RunDir) -> str:
    known = [stage for stage in run.stages if stage.seconds]
    if not known:
        return ""
    total = sum(stage.seconds or 0.0 for stage in known)
    rows = "".join(
        f"<tr><td>{_e(stage.name)}</td><td class='bars'>{bar((stage.seconds or 0.0) / total)}</td>"
        f'<td class="num">{clock(stage.seconds or 0.0)}</td>'
        + "".join(f'<td class="num soft">{cell}</td>' for cell in _speed(run, stage))
        + "</tr>"
        for stage in known
    )
    programs = run.summary.get("compile/count")
    said = "programs were compiled, each once and before its first use."
    compiled = f" {number(programs)} {said}" if is_figure(programs) else ""
    whole = run.summary.get("time/total_s")
    spent = f"{clock(whole)} in all." if isinstance(whole, (int, float)) else f"{clock(total)} in the stages so far."
    columns = ("Time", "Compiling", "Training", "Tokens/s", "MFU", "Programs")
    head = "".join(f"<th class='num'>{column}</th>" for column in columns)
    head = f"<thead><tr><th>Stage</th><th></th>{head}</tr></thead>"
    table = f'<div class="card words scroll"><table>{head}<tbody>{rows}</tbody></table></div>'
    return _section("Time", table + _update_parts(run), spent + _goodput(run) + compiled)


def _speed(run: RunDir, stage: Stage) -> list[str]:
    """Time to compile, the share in training steps, tokens a second and MFU (medians of the log rows), programs."""
    rows = run.timing.get(stage.name, ())
    rates = {key: [row[key] for row in rows if isinstance(row.get(key), float)] for key in ("tokens_per_s", "mfu")}
    middle = {key: statistics.median(found) for key, found in rates.items() if found}
    return [
        clock(stage.parts["compile"]) if "compile" in stage.parts else "",
        percent(stage.parts["train"] / stage.seconds) if stage.seconds and "train" in stage.parts else "",
        f"{middle['tokens_per_s']:,.0f}" if "tokens_per_s" in middle else "",
        percent(middle["mfu"]) if "mfu" in middle else "",
        "" if stage.programs is None else str(stage.programs),
    ]


def _goodput(run: RunDir) -> str:
    share = run.summary.get("time/goodput")
    if not isinstance(share, float):
        return ""
    parts = {name: sum(stage.parts.get(name, 0.0) for stage in run.stages) for name in ("compile", "evaluate", "save")}
    rest = ", ".join(f"{clock(seconds)} {_PARTS[name]}" for name, seconds in parts.items())
    return (
        f" Goodput, the share of it spent in training steps, was {percent(share)}; {rest}. MFU is the model's matrix"
        " products (three forward passes a training step, padding counted) a second, of what the device could do."
    )


_PARTS = {"compile": "compiling", "evaluate": "evaluating", "save": "saving"}


def _update_parts(run: RunDir) -> str:
    """Where the time of an update goes: means of the updates whose parts were timed one by one."""
    names = ("rollout", "score", "experience", "update")
    rows = [row for row in run.timing.get(run.scored, ()) if "rollout_s" in row]
    if not rows:
        return ""
    means = {name: statistics.fmean(row.get(f"{name}_s", 0.0) for row in rows) for name in names}
    total = sum(means.values()) or 1.0
    body = "".join(
        f"<tr><td>{name}</td><td class='bars'>{bar(seconds / total)}</td><td class='num'>{seconds:.2g} s</td></tr>"
        for name, seconds in means.items()
    )
    what = f"A {_e(run.about(run.scored).title)} update ({len(rows)} timed)"
    head = f"<thead><tr><th>{what}</th><th></th><th class='num'>Time</th></tr></thead>"
    return f'<div class="card words scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _everything(run: RunDir) -> str:
    """All final figures, samples of training and the resolved config, folded away."""
    parts = ""
    if run.summary:
        figures = findings.told(run)
        parts += _details(f"All {len(figures)} final figures (summary.json)", _key_table(list(figures.items())))
    during = [row for row in run.samples if row.get("set") not in ("before", "after")]
    if during:
        parts += _details("Answers during training", _during(during))
    if run.config:
        settings = list(itertools.islice(_settings(run.config), MOST_SETTINGS + 1))
        more = len(settings) > MOST_SETTINGS
        count = f"more than {MOST_SETTINGS}" if more else len(settings)
        table = _key_table(settings[:MOST_SETTINGS])
        parts += _details(f"The resolved config ({count} settings)", table)
    return _section("Everything else", parts) if parts else ""


def _details(title: str, content: str) -> str:
    return f"<details><summary>{_e(title)}</summary>{content}</details>"


def _key_table(values: Sequence[tuple[str, Any]]) -> str:
    rows = _within(
        (f'<tr><th scope="row">{_e(key)}</th><td>{_e(value)}</td></tr>' for key, value in values), MOST_TABLE
    )
    table = f'<div class="card keys scroll"><table><tbody>{"".join(rows)}</tbody></table></div>'
    return table + _more(len(values) - len(rows), "rows")


def _during(rows: Sequence[dict[str, Any]], most: int = 30) -> str:
    """A few answers of every logged step, evenly spread, at most `most`."""
    at: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        at.setdefault((row["stage"], row["step"]), []).append(row)
    steps = sorted(at, key=lambda key: key[1])
    chosen = steps if len(steps) <= 10 else [steps[round(i * (len(steps) - 1) / 9)] for i in range(10)]
    picked = [row for key in chosen for row in at[key][: max(1, most // len(chosen))]]
    tagged = ((row, _e(f"{row['stage']}, step {row['step']}")) for row in picked)
    blocks = _within(
        (f'<div class="pair" style="display:block">{_sample(row, "", tag)}</div>' for row, tag in tagged), MOST_TABLE
    )
    return f'<div class="pairs card">{"".join(blocks)}</div>' + _more(len(picked) - len(blocks), "of these")


def _settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("section.key", value), one after the other; a name has at most MOST_NAME characters and the mark of a cut."""
    for key, value in config.items():
        name = f"{prefix}{key[: MOST_NAME + 1]}"
        name = name if len(name) <= MOST_NAME else f"{name[:MOST_NAME]}…"
        if isinstance(value, dict) and value:
            yield from _settings(value, f"{name}.")
        else:
            yield name, value
