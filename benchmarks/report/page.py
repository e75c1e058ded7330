"""report.html: one file, nothing fetched, readable wide and on a phone, light and dark; figures/*.svg; summary.md."""

import html
import json
from pathlib import Path

from . import charts, draw, summary

STYLE = """
:root{color-scheme:light dark;--page:#fff;--panel:#f6f8fa}
@media (prefers-color-scheme:dark){:root{--page:#16191d;--panel:#1f242a}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:58rem;padding:1.2rem 1.2rem 4rem;background:var(--page);color:var(--ink);
 font:16px/1.5 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.2;margin:.5rem 0}h2{font-size:1.2rem;margin:2.6rem 0 .3rem;line-height:1.3}
p{margin:.4rem 0 .8rem}.small,figcaption,summary{color:var(--muted);font-size:.9rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem .9rem;margin:1rem 0;font-size:.9rem}
dt{color:var(--muted)}dd{margin:0}
nav{display:flex;flex-wrap:wrap;gap:.2rem .9rem;font-size:.9rem;margin:1rem 0}a{color:var(--s0)}
ul{padding-left:1.2rem}li{margin:.3rem 0}
figure{margin:.4rem 0 .6rem}figure svg{display:block;width:100%;height:auto;max-width:52rem}
.narrow{display:none}@media (max-width:640px){.narrow{display:block}.wide{display:none}body{padding:.8rem .9rem 3rem}
 dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:.35rem}h1{font-size:1.4rem}}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid var(--grid);white-space:nowrap;overflow-wrap:normal}
th{color:var(--muted);font-weight:600}td:first-child,th:first-child{text-align:left;padding-left:0}
details{margin:.3rem 0}summary{cursor:pointer;padding:.35rem 0}
.peer th{text-align:left}.peer td{text-align:left;white-space:normal;min-width:5rem}.peer td:last-child{white-space:nowrap}.faster{color:var(--s4);font-weight:600}
"""


def table(head, rows, style=""):
    def cell(value):
        text = html.escape(charts.number(value))
        return f'<td data-value="{value!r}">{text}</td>' if isinstance(value, (int, float)) else f"<td>{text}</td>"
    return (f'<div class="scroll"><table class="{style}"><thead><tr>' + "".join(f"<th>{html.escape(h)}</th>" for h in head)
            + "</tr></thead><tbody>" + "".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows)
            + "</tbody></table></div>")


def figure(chart):
    head, rows = chart.table()
    return (f'<section id="{chart.id}"><h2>{html.escape(chart.title)}</h2><figure data-chart="{chart.id}" data-kind="{chart.kind}">'
            f'<div class="wide">{draw.svg(chart)}</div><div class="narrow">{draw.svg(chart, narrow=True)}</div>'
            f"<figcaption>{html.escape(chart.text)}</figcaption></figure>"
            f"<details><summary>The numbers</summary>{table(head, rows)}</details></section>")


def peer_section(results):
    rows = charts.peer_table(results)
    if not rows:
        return ""
    body = []
    for case, storage, sizes, own, others in sorted(rows, key=lambda row: min(r for *_, r in row[4])):
        at = ", ".join(f"{key} {value}" for key, value in sizes.items())
        for i, (library, ms, ratio) in enumerate(others):
            faster = ' class="faster"' if ratio <= 1 / 1.05 else ""
            body.append(f"<tr><td>{html.escape(f'{case} {storage}, {at}') if i == 0 else ''}</td><td>{charts.number(own)}</td>"
                        f"<td>{html.escape(library)}</td><td>{charts.number(ms)}</td><td{faster}>{charts.verdict(ratio)}</td></tr>")
    return ('<section id="peer-table"><h2>Beside other libraries</h2><p>Same inputs, threads and session, outputs compared before '
            "timing; medians. Cases in which a peer is fastest come first. Gaps under 5 % are ties.</p>"
            '<div class="scroll"><table class="peer"><thead><tr><th>case</th><th>qkv ms</th><th>peer</th><th>ms</th><th></th></tr>'
            "</thead><tbody>" + "".join(body) + "</tbody></table></div></section>")


def memory_section(results):
    rows = charts.memory_table(results)
    return ('<section id="memory-table"><details><summary>Computed, allocated and resident bytes of every cache</summary>'
            + table(["cache", "computed", "allocated", "resident"], rows) + "</details></section>") if rows else ""


def row_sections(results):
    by_program = {}
    for row in results.rows.values():
        if not row.error and row.path[1:2] != ["slope"]:
            by_program.setdefault(row.program, []).append(row)
    return "".join(f"<details><summary>{html.escape(program)}, {len(rows)} rows</summary>"
                   + table(summary.ROW_HEAD, [summary.row_cells(row) for row in rows]) + "</details>"
                   for program, rows in by_program.items())


def render(results, all_charts, missing):
    about = summary.context_of(results)
    facts = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in summary.machine_lines(about))
    found = "".join(f"<li>{html.escape(line)}</li>" for line in summary.findings(results))
    links = "".join(f'<a href="#{chart.id}">{html.escape(chart.title)}</a>' for chart in all_charts)
    left = [f"{name}: no {what}" for name, what in missing] + [f"{row.name}: {row.error}" for row in results.failed()]
    left_out = ('<section id="left-out"><h2>Left out</h2><ul>' + "".join(f"<li>{html.escape(x)}</li>" for x in left)
                + "</ul></section>") if left else ""
    data = {chart.id: [{"label": s.label, "points": s.points} for s in chart.series if not s.dashed] for chart in all_charts}
    peers = peer_section(results)
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,'
            f'initial-scale=1"><title>qkv: what was measured</title><link rel="icon" href="data:,">'
            f"<style>{draw.css(':root')}{STYLE}</style></head><body><h1>qkv: what was measured</h1>"
            f"<ul>{found}</ul><dl>{facts}</dl><nav>{links}"
            + ('<a href="#peer-table">Peers</a>' if peers else "") + '<a href="#rows">All rows</a></nav>'
            + "".join(map(figure, all_charts)) + memory_section(results) + peers
            + '<section id="rows"><h2>All rows, the error beside the speed</h2><p>Medians over repetitions. Errors are against a slow '
            "reference in double, taken before anything was timed; a row past its tolerance has no figure.</p>"
            + row_sections(results) + "</section>" + left_out
            + f'<script type="application/json" id="figures">{json.dumps(data).replace("</", "<" + chr(92) + "/")}</script></body></html>\n')


def write(results, folder):
    """Writes everything and returns the paths."""
    folder = Path(folder)
    all_charts, missing = charts.all_charts(results)
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for chart in all_charts:
        (figures / f"{chart.id}.svg").write_text(draw.lone(draw.svg(chart)))
    (folder / "report.html").write_text(render(results, all_charts, missing))
    (folder / "summary.md").write_text(summary.markdown(results, all_charts, missing))
    return [folder / "report.html", folder / "summary.md", figures]
