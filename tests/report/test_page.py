"""The report in headless Chromium, made from made-up numbers: no console errors, every figure there and readable at desktop
and phone widths, light and dark, and what is drawn lies where the JSON says."""

import html
import json
import math
import os
import re
import subprocess
import tempfile
import unittest
from pathlib import Path

import canned
from report import charts, page, results

WIDTHS = (1280, 390)
# Looks at the page in frames of both widths, once loaded, and prints what it finds as JSON.
PROBE = """<!doctype html><meta charset="utf-8"><body style="margin:0"><pre id="found"></pre>%s<script>
function look(frame) {
  const page = frame.contentDocument, view = frame.contentWindow, charts = {};
  for (const figure of page.querySelectorAll('figure[data-chart]')) {
    const shown = [...figure.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width > 0);
    if (shown.length !== 1) { charts[figure.dataset.chart] = {shown: shown.length}; continue; }
    const svg = shown[0], box = svg.getBoundingClientRect(), series = {}, bars = {};
    const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
    const outside = texts.filter(([, r]) => r.left < box.left - 1 || r.right > box.right + 1 || r.top < box.top - 1 || r.bottom > box.bottom + 1);
    const overlapping = [];
    texts.forEach(([a, r], i) => texts.slice(i + 1).forEach(([b, q]) => {
      if (Math.min(r.right, q.right) - Math.max(r.left, q.left) > 2 && Math.min(r.bottom, q.bottom) - Math.max(r.top, q.top) > 4) overlapping.push(a + ' / ' + b);
    }));
    for (const group of svg.querySelectorAll('[id*="-series-"]'))
      series[group.id.split('-series-')[1]] = [...group.querySelectorAll('use')].map(u => [+u.getAttribute('x'), +u.getAttribute('y')]);
    for (const group of svg.querySelectorAll('[id*="-bar-"]')) bars[group.id.split('-bar-')[1]] = group.querySelector('path').getBBox().width;
    charts[figure.dataset.chart] = {shown: 1, width: box.width, height: box.height, outside: outside.map(x => x[0]), overlapping, series, bars,
      small: Math.min(...texts.map(([, r]) => r.height)), ink: view.getComputedStyle(svg.querySelector('text')).fill};
  }
  return {charts, wide: page.documentElement.scrollWidth - view.innerWidth, data: page.getElementById('figures').textContent,
    background: view.getComputedStyle(page.body).backgroundColor, ids: (ids => ids.length - new Set(ids).size)([...page.querySelectorAll('[id]')].map(e => e.id)),
    fetched: view.performance.getEntriesByType('resource').length};
}
onload = () => { document.getElementById('found').textContent = JSON.stringify([...document.querySelectorAll('iframe')].map(look)); };
</script>"""


def browse(address, folder, dark):
    command = [os.environ.get("QKV_CHROMIUM", "chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
               "--no-first-run", "--disable-extensions", f"--user-data-dir={folder}/profile", "--window-size=1700,900",
               f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--enable-logging=stderr", "--virtual-time-budget=4000",
               "--dump-dom", address]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = re.search(r'<pre id="found">(.*?)</pre>', ended.stdout, re.S)
    console = [line for line in ended.stderr.splitlines() if ":CONSOLE" in line]
    return (json.loads(html.unescape(found[1])) if found and found[1] else None), console, ended


def luminance(colour):
    channels = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def largest_misfit(pixels, values):
    """Of a straight line through (value, pixel): how far the worst pixel lies from it, and its slope."""
    n, mean_v, mean_p = len(values), sum(values) / len(values), sum(pixels) / len(pixels)
    spread = sum((v - mean_v) ** 2 for v in values)
    slope = sum((v - mean_v) * (p - mean_p) for v, p in zip(values, pixels)) / spread
    return max(abs(p - mean_p - slope * (v - mean_v)) for v, p in zip(values, pixels)), slope


class Page(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory()
        cls.root = Path(cls.temporary.name)
        cls.results = results.read(canned.write(cls.root))
        page.write(cls.results, cls.root)
        cls.text = (cls.root / "report.html").read_text()
        cls.found = {}
        for dark in (False, True):
            frames = "".join(f'<iframe width="{w}" height="900" style="border:0" srcdoc="{html.escape(cls.text)}"></iframe>' for w in WIDTHS)
            (cls.root / "probe.html").write_text(PROBE % frames)
            cls.found[dark], console, ended = browse((cls.root / "probe.html").as_uri(), cls.root, dark)
            assert cls.found[dark], "Chromium showed nothing: " + ended.stderr[-2000:]
            cls.console = console if not dark else cls.console + console

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    def frames(self):
        for dark, frames in self.found.items():
            for width, frame in zip(WIDTHS, frames):
                yield f"{width} px, {'dark' if dark else 'light'}", width, frame

    def test_console_is_silent_and_nothing_is_fetched(self):
        self.assertEqual(self.console, [])
        self.assertTrue(all(frame["fetched"] == 0 for _, _, frame in self.frames()))
        without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", self.text)
        self.assertIsNone(re.search(r'(src|href)="(?!#|data:)|url\((?!#)|@import|https?:', without_names))

    def test_every_figure_is_shown_once_and_fits(self):
        for where, width, frame in self.frames():
            self.assertEqual(len(frame["charts"]), len(charts.ALL), where)
            self.assertLessEqual(frame["wide"], 0, f"{where}: the page is wider than the window")
            self.assertEqual(frame["ids"], 0, f"{where}: an id is there twice")
            for name, chart in frame["charts"].items():
                with self.subTest(where=where, chart=name):
                    self.assertEqual(chart["shown"], 1)
                    self.assertGreater(chart["width"], 0.8 * min(width, 850))
                    self.assertGreater(chart["height"], 120)
                    self.assertGreaterEqual(chart["small"], 9, "letters are too small")
                    self.assertEqual(chart["outside"], [])
                    self.assertEqual(chart["overlapping"], [])

    def test_letters_stand_out_in_light_and_dark(self):
        backgrounds = set()
        for where, _, frame in self.frames():
            backgrounds.add(frame["background"])
            for name, chart in frame["charts"].items():
                self.assertGreater(contrast(chart["ink"], frame["background"]), 4.5, f"{where}, {name}")
        self.assertEqual(len(backgrounds), 2, "dark looks like light")

    def test_what_is_drawn_lies_where_the_numbers_say(self):
        drawn, _ = charts.all_charts(self.results)
        for where, _, frame in self.frames():
            for chart in drawn:
                shown, solid = frame["charts"][chart.id], [s for s in chart.series if not s.dashed]
                with self.subTest(where=where, chart=chart.id):
                    scale_y = math.log if chart.log_y else float
                    if chart.kind == "bars":
                        values = [scale_y(y) for s in solid for _, y in s.points]
                        widths = [shown["bars"][f"{i}-{j}"] for i, s in enumerate(solid) for j in range(len(s.points))]
                        misfit, slope = largest_misfit(widths, values)
                        self.assertLess(misfit, 0.5)
                        self.assertGreater(slope, 0)
                        continue
                    points = [point for s in solid for point in s.points]
                    pixels = [point for i in range(len(solid)) for point in shown["series"][str(i)]]
                    self.assertEqual(len(pixels), len(points))
                    for axis, scale, sign in ((0, math.log if chart.log_x else float, 1), (1, scale_y, -1)):
                        misfit, slope = largest_misfit([p[axis] for p in pixels], [scale(p[axis]) for p in points])
                        self.assertLess(misfit, 0.5)
                        self.assertGreater(sign * slope, 0)

    def test_the_numbers_of_figures_are_those_of_the_files(self):
        """Against the JSON itself, not through the code that draws."""
        data = json.loads(self.found[False][0]["data"])
        middle = {}
        for rows in canned.rows().values():
            for raw in rows:
                if raw["repetition_index"] == 1:  # made to be the median
                    middle[raw["name"].removesuffix("/manual_time")] = raw

        def points(chart, label):
            return [tuple(p) for s in data[chart] if s["label"] == label for p in s["points"]]

        self.assertEqual(points("cache-bytes", "bf16"), [("MHA", 8192.0), ("GQA, 8 key/value heads", 4096.0), ("MQA", 512.0), ("MLA", 1152.0)])
        self.assertEqual(points("prefill", "f32"), [(n, middle[f"prefill/causal/f32/n:{n}/heads:8/kv_heads:8/d:128/threads:1"]["peak_fraction"])
                                                    for n in (512, 1024, 2048, 4096)])
        self.assertEqual(points("cache-or-not", "without a cache"),
                         [(n, middle[f"scaling/generate/recompute/f32/n:{n}"]["real_time"] / n) for n in (256, 512, 1024)])
        self.assertEqual(points("peers-n", "fastlib"), [(n, middle[f"peer/fastlib/prefill/f32/n:{n}/heads:8/kv_heads:8/d:128/threads:1"]["real_time"])
                                                      for n in (512, 1024, 2048)])
        self.assertEqual(points("break-even", "16 heads, 1,024 cached"), [(64, 2.0), (128, 1.25), (192, 0.75), (256, 0.5)])
        self.assertEqual(dict(points("decode-storage", "tokens per second"))["int8"], 500.0)
        self.assertEqual(points("memory", "latent"), [(n, 101.0 * n / 1e6) for n in (512, 1024, 2048)])
        self.assertIn('<td>fastlib</td><td>5.12</td><td class="faster">peer 2x faster</td>', self.text)

    def test_lone_figures_are_there_and_well_formed(self):
        import xml.etree.ElementTree as tree
        files = sorted((self.root / "figures").glob("*.svg"))
        self.assertEqual(len(files), len(charts.ALL))
        for file in files:
            tree.parse(file)


if __name__ == "__main__":
    unittest.main()
