"""Line charts, scatter charts and bars as inline SVG: no library, no external resource, colours from CSS variables."""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
import math
from collections.abc import Callable, Sequence

WIDTH, HEIGHT = 380, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 28
TINY = 1e-300  # spans and values below it cannot be divided by or drawn on a logarithmic axis
LONG = 1e15  # figures from it on are written with an exponent
MOST_POINTS = 400  # of a curve: more than a screen shows
MOST_TICKS = 20

Points = Sequence[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve. `style`: "main", "second", "third" (colours) or "faint"; `dots` marks every point."""

    label: str
    points: Points
    style: str = "main"
    dots: bool = False


@dataclasses.dataclass(frozen=True)
class Mark:
    """A horizontal (axis "y") or vertical (axis "x") reference line."""

    value: float
    label: str
    axis: str = "y"


def number(value: float | None) -> str:
    """A figure to read: integers whole, else three significant digits, a true minus sign, thousands apart."""
    if value is None or not math.isfinite(value):
        return "–"
    if abs(value) >= LONG:
        return f"{float(value):.3g}".replace("e+", "e").replace("-", "\u2212")
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f").replace("-", "\u2212")
    size = abs(value)
    if size >= 1000:
        text = f"{value:,.0f}".replace(",", "\u202f")
    elif size >= 100:
        text = f"{value:.0f}"
    elif size >= 10:
        text = f"{value:.1f}"
    elif size >= 0.01 or size == 0:
        text = f"{value:.3g}"
    elif size >= 0.001:
        text = f"{value:.4f}"
    else:
        text = f"{value:.1e}".replace("e-0", "e-")
    return text.replace("-", "\u2212")


def percent(value: float | None) -> str:
    """A share as "46.5 %"."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{number(100 * value)} %" if abs(value) >= LONG else f"{100 * value:.1f} %".replace("-", "\u2212")


def with_interval(
    form: Callable[[float | None], str],
    value: float | None,
    low: float | None = None,
    high: float | None = None,
    n: float | None = None,
) -> str:
    """A figure with what is known of its 95 % interval and of how many things it is: "84.6 % (78 to 90, n 39)".

    Ends of a share are whole but where one is within half a point of it: rounded, the two need not hold it.
    """
    ends = [] if low is None or high is None else [low, high]
    close = value is not None and any(abs(end - value) < 0.005 for end in ends)
    said = [_whole(100 * end) if form is percent and not close else form(end).removesuffix(" %") for end in ends]
    count = [] if n is None else [f"n {_whole(n)}"]
    beside = [" to ".join(said)] * bool(said) + count
    return form(value) + (f" ({', '.join(beside)})" if beside else "")


def _whole(value: float) -> str:
    """Without decimals, and without the sign of a zero."""
    return number(round(value)) if abs(value) < LONG else number(value)


def clock(seconds: float) -> str:
    """A duration as "8.2 s", "61 s" or "1 h 5 min 07 s"."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    return (f"{hours} h " if hours else "") + f"{rest // 60} min {rest % 60:02d} s"


def axis_texts(values: Sequence[float], form: Callable[[float | None], str]) -> list[str]:
    """Tick labels with as many decimals as their distance needs, the same for all."""
    scale, unit = (100.0, " %") if form is percent else (1.0, "")
    steps = [abs(b - a) * scale for a, b in itertools.pairwise(values)]
    if not steps or min(steps) < 1e-3 or max(steps) > min(1.5 * min(steps), LONG):  # one, tiny, a log axis, huge
        return [form(value) for value in values]
    decimals = next(d for d in range(5) if all(abs(round(s, d) - s) < 1e-6 * s for s in steps) or d == 4)
    return [f"{v * scale:,.{decimals}f}{unit}".replace(",", "\u202f").replace("-", "\u2212") for v in values]


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) inside [low, high], about `wanted` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / max(wanted - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(math.log(s / raw)))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclasses.dataclass(frozen=True)
class Scale:
    """Maps values to pixels, linearly or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, wanted: int) -> list[float]:
        """Where the axis is labelled."""
        if not self.log:
            return ticks(self.low, self.high, wanted)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5)):
            found = [m * 10.0**d for d in decades for m in steps if self.low <= m * 10.0**d <= self.high]
            if len(found) >= 3:
                break
        return found[:: math.ceil(len(found) / MOST_TICKS)]


def _scale(values: list[float], start: float, end: float, *, pad: float, allow_log: bool) -> Scale:
    low, high = min(values), max(values)
    if allow_log and low > TINY and high / low > 20:
        return Scale(low / 1.15, high * 1.15, start, end, log=True)
    room = (high - low) * pad if high - low > TINY else abs(high) * 0.1 if abs(high) > TINY else 1.0
    padded = low - room
    if low >= 0 > padded:
        padded = 0.0
    return Scale(padded, high + room, start, end)


def smooth(points: Points, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """A centred moving mean over a twentieth of the points, over fewer towards the ends, which stay where they are.

    Of more than `most` points it is taken at so many, evenly spread.
    """
    values, last, out = [y for _, y in points], len(points) - 1, []
    wide, count = max(1, len(points) // 40), min(most, len(points))
    for i in dict.fromkeys(round(j * last / max(count - 1, 1)) for j in range(count)):
        reach = min(wide, i, last - i)
        near = values[i - reach : i + reach + 1]
        out.append((points[i][0], sum(near) / len(near)))
    return out


def thin(points: Points, most: int = MOST_POINTS) -> Points:
    """At most about `most` of the points, in their order: the ends, and the lowest and highest of every stretch."""
    if len(points) <= most:
        return points
    wide = math.ceil(2 * len(points) / most)
    kept = {0, len(points) - 1}
    for begin in range(0, len(points), wide):
        stretch = range(begin, min(begin + wide, len(points)))
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def line_chart(
    lines: Sequence[Line],
    *,
    label: str,
    x_label: str = "step",
    marks: Sequence[Mark] = (),
    form: Callable[[float | None], str] = number,
    x_form: Callable[[float | None], str] = number,
    log: bool = True,
    path_ends: tuple[str, str] | None = None,
) -> str:
    """The curves over a shared x axis.

    Args:
      lines: curves; each has at least one point. Long ones are thinned, peaks kept.
      label: what is drawn, for readers who cannot see it; the first and last values are added.
      marks: reference lines; a horizontal one is drawn only where it does not squash the curves.
      form, x_form: how values are written.
      log: allow a logarithmic y axis for wide ranges.
      path_ends: names of the first and last point, where the curve is a path (the frontier).
    Returns:
      An <svg> element of WIDTH x HEIGHT units that scales with its container.
    """
    lines = [dataclasses.replace(line, points=thin(line.points)) for line in lines]
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    reach = max(ys) - min(ys) or abs(max(ys)) or 1.0
    marks = [m for m in marks if m.axis == "x" or min(ys) - 1.5 * reach <= m.value <= max(ys) + 1.5 * reach]
    ys += [m.value for m in marks if m.axis == "y"]
    xs += [m.value for m in marks if m.axis == "x"]
    sx = _scale(xs, LEFT, WIDTH - RIGHT, pad=0.03 if path_ends else 0.0, allow_log=False)
    sy = _scale(ys, HEIGHT - BOTTOM, TOP, pad=0.08, allow_log=log)
    parts = [_axes(sx, sy, x_label, form, x_form, whole=all(isinstance(x, int) for x in xs))]
    drawn = [_mark(mark, sx, sy) for mark in marks]
    parts += [rule for rule, _ in drawn]
    parts += [_curve(line, sx, sy) for line in lines]
    parts += [name for _, name in drawn]
    if path_ends:
        parts.append(_ends(lines[0].points, path_ends, sx, sy))
    parts.append('<line class="cursor" y1="0" y2="0" x1="0" x2="0"/>')
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
    shown = [line for line in lines if line.style != "faint"]
    return f"{head} {_readings(shown, label, x_label, sx, sy, form, x_form)}>{''.join(parts)}</svg>"


def _readings(lines: Sequence[Line], label: str, x_label: str, sx: Scale, sy: Scale, form, x_form) -> str:
    """Attributes: the chart in words, and its points for the reading under the pointer."""
    said = "; ".join(
        f"{line.label} from {form(line.points[0][1])} at {x_label} {x_form(line.points[0][0])} "
        f"to {form(line.points[-1][1])} at {x_form(line.points[-1][0])}"
        for line in lines
    )
    data = [
        {
            "label": line.label,
            "points": [[round(sx(x), 1), round(sy(y), 1), x_form(x), form(y)] for x, y in line.points],
        }
        for line in lines
    ]
    values = {"aria-label": f"{label}: {said}", "data-x": x_label}
    points = html.escape(json.dumps(data, separators=(",", ":")), quote=False).replace("'", "&#x27;")
    return " ".join(f'{n}="{html.escape(v, quote=True)}"' for n, v in values.items()) + f" data-lines='{points}'"


def _axes(sx: Scale, sy: Scale, x_label: str, form, x_form, *, whole: bool) -> str:
    parts = []
    heights = sy.ticks(5)
    for value, text in zip(heights, axis_texts(heights, form), strict=True):
        y = sy(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
    base = HEIGHT - BOTTOM
    places = [v for v in sx.ticks(5) if sx.low <= v <= sx.high and (v == round(v) or not whole)]
    for value, text in zip(places, axis_texts(places, x_form), strict=True):
        x = sx(value)
        anchor = "end" if x > WIDTH - RIGHT - 8 else "start" if x < LEFT + 4 else "middle"
        parts.append(f'<text class="tick" x="{x:.1f}" y="{base + 14}" text-anchor="{anchor}">{text}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    scale = " · log scale" if sy.log else ""
    name = html.escape(x_label + scale)
    parts.append(f'<text class="tick name" x="{middle}" y="{HEIGHT - 2}" text-anchor="middle">{name}</text>')
    return "".join(parts)


def _mark(mark: Mark, sx: Scale, sy: Scale) -> tuple[str, str]:
    """The rule, drawn under the curves, and its name, drawn over them."""
    text = html.escape(mark.label)
    if mark.axis == "y":
        y = sy(mark.value)
        above = y - 4 if y > TOP + 14 else y + 12
        return (
            f'<line class="mark" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>',
            f'<text class="marked" x="{WIDTH - RIGHT}" y="{above:.1f}" text-anchor="end">{text}</text>',
        )
    x = sx(mark.value)
    return (
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>',
        f'<text class="marked" x="{x - 4:.1f}" y="{HEIGHT - BOTTOM - 6}" text-anchor="end">{text}</text>',
    )


def _curve(line: Line, sx: Scale, sy: Scale) -> str:
    places = [(sx(x), sy(y)) for x, y in line.points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts = [f'<path class="line {line.style}" d="{path}"/>'] if len(places) > 1 else []
    if line.dots or len(places) == 1:
        parts += [
            f'<circle class="dot {line.style}" cx="{x:.1f}" cy="{y:.1f}" r="2.6" '
            f'style="opacity:{0.35 + 0.65 * (i + 1) / len(places):.2f}"/>'
            for i, (x, y) in enumerate(places)
        ]
    return "".join(parts)


def _ends(points: Points, names: tuple[str, str], sx: Scale, sy: Scale) -> str:
    parts = []
    for (x, y), name, kind in zip((points[0], points[-1]), names, ("first", "last"), strict=True):
        px, py = sx(x), sy(y)
        fits = px + 10 + 6.2 * len(name) < WIDTH - RIGHT
        anchor, shift = ("start", 9) if fits else ("end", -9)
        below = py + 4 if kind == "first" or fits else py + 18
        parts.append(f'<circle class="end {kind}" cx="{px:.1f}" cy="{py:.1f}" r="4.5"/>')
        place = f'x="{px + shift:.1f}" y="{below:.1f}" text-anchor="{anchor}"'
        parts.append(f'<text class="endname" {place}>{html.escape(name)}</text>')
    return "".join(parts)


def dumbbell(before: float, after: float, low: float, high: float, mark: float | None = None) -> str:
    """Before (hollow) and after (full) on one line from `low` to `high`; `mark` is a small reference tick."""
    width, height = 160, 18
    scale = Scale(low, high if high > low else low + 1.0, 7, width - 7)
    a, b = (scale(min(max(v, scale.low), scale.high)) for v in (before, after))
    tick = ""
    if mark is not None and scale.low <= mark <= scale.high:
        tick = f'<line class="human" x1="{scale(mark):.1f}" x2="{scale(mark):.1f}" y1="2" y2="{height - 2}"/>'
    return (
        f'<svg class="dumbbell" viewBox="0 0 {width} {height}" aria-hidden="true">'
        f'<line class="rail" x1="2" x2="{width - 2}" y1="9" y2="9"/>{tick}'
        f'<line class="span" x1="{a:.1f}" x2="{b:.1f}" y1="9" y2="9"/>'
        f'<circle class="was" cx="{a:.1f}" cy="9" r="4.2"/><circle class="is" cx="{b:.1f}" cy="9" r="5"/></svg>'
    )


def bar(share: float, *, style: str = "") -> str:
    """A horizontal bar filled to `share` in [0, 1]."""
    width = 100 * min(max(share, 0), 1)
    return f'<span class="bar {style}" aria-hidden="true"><span style="width:{width:.1f}%"></span></span>'
