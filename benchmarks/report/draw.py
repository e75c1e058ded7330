"""Charts as SVG, by matplotlib: once wide, once for a phone; colours are variables that follow light and dark."""

import io
import re

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib import ticker  # noqa: E402

# Light and dark of every colour; texts and lines reach 4.5 : 1 and 3 : 1 against the page's background.
COLOURS = {"ink": ("#1b1f24", "#e8eaed"), "muted": ("#59626d", "#a4adb8"), "grid": ("#e1e5ea", "#343b44")}
SERIES = (("#1d6fc2", "#63aef7"), ("#bd5209", "#f29b52"), ("#14804c", "#4fc68d"), ("#7a4dc8", "#b798f4"),
          ("#bf2d3b", "#f47f87"), ("#0a7884", "#4dc5d1"), ("#766419", "#d0bc5c"), ("#a0357e", "#ec8fca"))
COLOURS.update({f"s{i}": pair for i, pair in enumerate(SERIES)})
MARKERS = "osD^vP*X"


def css(selector):
    """The variables, light and dark, for a page or a lone SVG."""
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in COLOURS.items()) for i in (0, 1))
    return f"{selector}{{{light}}}@media (prefers-color-scheme:dark){{{selector}{{{dark}}}}}"


def human(value, _=None):
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _axis(axis, log, values, few=False):
    axis.set_major_formatter(ticker.FuncFormatter(human))
    if not log:
        return
    axis.set_minor_formatter(ticker.NullFormatter())
    axis.set_minor_locator(ticker.NullLocator())
    low, high = min(values), max(values)
    if high / low < (12 if few else 100):  # not enough for powers of ten
        axis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 2, 5)))


def _draw_lines(axes, chart, narrow):
    index = 0
    for series in chart.series:
        xs, ys = zip(*series.points)
        if series.dashed:
            axes.plot(xs, ys, "--", color=COLOURS["muted"][0], linewidth=1.2, label=series.label, zorder=1)
            continue
        axes.plot(xs, ys, marker=MARKERS[index % 8], markersize=5 if narrow else 5.5,
                  linewidth=1.8, linestyle="none" if chart.kind == "dots" else "-", color=SERIES[index % 8][0],
                  label=series.label, gid=f"series-{index}", zorder=3, alpha=0.85 if chart.kind == "dots" else 1)
        index += 1
    if chart.log_x:
        axes.set_xscale("log")
    if chart.log_y:
        axes.set_yscale("log")
    xs = sorted({x for s in chart.series if not s.dashed for x, _ in s.points})
    _axis(axes.yaxis, chart.log_y, [y for s in chart.series for _, y in s.points])
    if chart.kind == "lines" and len(xs) <= 12 and all(float(x).is_integer() for x in xs):
        while len(xs) > (5 if narrow else 12):
            xs = xs[::2]
        axes.set_xticks(xs)
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v / 1024:g}k" if v >= 1024 and v % 1024 == 0 else f"{v:g}"))
    else:
        _axis(axes.xaxis, chart.log_x, xs, narrow)
    if not chart.log_y:
        axes.set_ylim(0, 1.08 * max(y for s in chart.series for _, y in s.points))
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)
    axes.grid(True, which="major", color=COLOURS["grid"][0], linewidth=0.8)


def _bar_places(chart):
    """({(series, category): place}, {category: middle of its bars}), in units of one bar; nothing is kept free for bars
    that are not there."""
    at, middles, place = {}, {}, 0.0
    for name in dict.fromkeys(x for s in chart.series for x, _ in s.points):
        here = [i for i, s in enumerate(chart.series) if name in dict(s.points)]
        for offset, i in enumerate(here):
            at[i, name] = place + offset
        middles[name] = place + (len(here) - 1) / 2
        place += len(here) + 0.5
    return at, middles


def _draw_bars(axes, chart, narrow):
    at, middles = _bar_places(chart)
    most = max(y for s in chart.series for _, y in s.points)
    least = min(y for s in chart.series for _, y in s.points)
    if chart.log_y:
        axes.set_xscale("log")
        axes.set_xlim(min(least, chart.mark or least) / (1.3 if chart.mark else 2), most * (4 if narrow else 2))
    else:
        notes = any(s.notes for s in chart.series)
        axes.set_xlim(0, most * ((1.2 if narrow else 2.1) if notes else 1.2 if narrow else 1.12))
    for i, series in enumerate(chart.series):
        for j, (name, y) in enumerate(series.points):
            axes.barh(at[i, name], y, 0.84, left=0, color=SERIES[i % 8][0], gid=f"bar-{i}-{j}",
                      label=series.label if j == 0 else None, zorder=3)
            note = f"{y:,.0f}" if y == int(y) and y < 1e6 else human(float(f"{y:.3g}"))
            if series.notes and not narrow:
                note += ", " + series.notes[j]
            axes.annotate(note, (y, at[i, name]), (4, 0), textcoords="offset points", va="center", ha="left",
                          fontsize=8.5 if len(chart.series) > 2 else None)
    if chart.mark is not None:
        axes.axvline(chart.mark, color=COLOURS["ink"][0], linewidth=1.2, linestyle="--", zorder=4)
    axes.set_yticks(list(middles.values()), [_wrapped(name) if narrow else name for name in middles])
    axes.set_ylim(max(at.values()) + 0.8, -0.8)
    axes.set_xlabel(chart.y)
    axes.tick_params(axis="y", length=0)
    _axis(axes.xaxis, chart.log_y, [least, most], narrow)
    axes.grid(True, axis="x", which="major", color=COLOURS["grid"][0], linewidth=0.8)


def _wrapped(name):
    return name.replace(", ", ",\n", 1)


def svg(chart, narrow=False):
    """One <svg> element; ids are unique to the chart, colours are var(--name, light)."""
    ink, muted = COLOURS["ink"][0], COLOURS["muted"][0]
    style = {"svg.fonttype": "none", "svg.hashsalt": chart.id + str(narrow), "font.family": "sans-serif",
             "font.size": 10.5, "text.color": ink, "axes.labelcolor": muted, "xtick.color": muted, "ytick.color": ink
             if chart.kind == "bars" else muted, "axes.edgecolor": COLOURS["grid"][0], "axes.linewidth": 1,
             "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "axes.axisbelow": True}
    with matplotlib.rc_context(style):
        entries = len(chart.series) if len(chart.series) > 1 else 0
        if chart.kind == "bars":
            at, _ = _bar_places(chart)
            tall = 0.8 + (max(at.values()) + 1.6) * (0.27 if len(chart.series) == 1 else 0.2)
        else:
            tall = 3.1 if narrow else 3.6
        columns = 1 if narrow else 3
        longest = max(len(s.label) for s in chart.series)
        if narrow and longest <= 16:
            columns = 2
        rows = -(-entries // columns) if entries else 0
        figure, axes = plt.subplots(figsize=(3.6 if narrow else 7.6, tall + 0.165 * rows), layout="constrained")
        (_draw_bars if chart.kind == "bars" else _draw_lines)(axes, chart, narrow)
        if entries:
            handles, labels = axes.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper left" if matplotlib.__version_info__ >= (3, 7) else "upper left",
                          ncol=columns, fontsize=9.5, handlelength=1.8, columnspacing=1.4, labelspacing=0.25, borderaxespad=0)
            if matplotlib.__version_info__ < (3, 7):  # no "outside" yet: leave room by hand
                room = (0.165 * rows + 0.1) / (tall + 0.165 * rows)
                figure.get_layout_engine().set(w_pad=0.04, h_pad=0.04, rect=(0, 0, 1, 1 - room))
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    text = out.getvalue()
    text = text[text.index("<svg"):]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    own = f"{chart.id}-{'n' if narrow else 'w'}-"
    text = re.sub(r'\bid="', f'id="{own}', text)
    text = re.sub(r'href="#', f'href="#{own}', text)
    text = text.replace("url(#", f"url(#{own}")
    for name, (light, _) in COLOURS.items():
        text = text.replace(light, f"var(--{name},{light})")
    text = re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font: \1px system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif", text)
    head, rest = text.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{chart.title}: {chart.y} by {chart.x}">{rest}'


def lone(text):
    """The same SVG as a file of its own."""
    head, rest = text.split(">", 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}><style>{css(":root")}svg{{background:Canvas;color-scheme:light dark}}</style>{rest}'
