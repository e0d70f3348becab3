"""`--mode=report`: report.html, one page about a run that needs no network: curves, results, and a guidance explorer.

The explorer shows the same seeds and classes at every weight of a sweep. Everything is inside of the page: pictures as
PNG in data URIs, curves as SVG, no script but its own few lines.
"""

import base64
import html
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict
from PIL import Image

from cfd import npz, paper, results, workdir
from cfd.evaluation import labels_of, samples_path
from cfd.results import Row

IMAGE_BYTES = 5_000_000
"""Of all pictures before PNG and base64, so that the page stays below 10 MB."""
MAX_IMAGES = 20
MAX_POINTS = 400


class Line(NamedTuple):
    """A curve: its name, its points (x, y, what is said of the point), and whether it is the paper's."""

    name: str
    points: list[tuple[float, float, str]]
    published: bool


def report(folder: str) -> str:
    """Write report.html in a run's folder and return its path. Raises ValueError if the folder holds no run."""
    content = workdir.read_config(folder)
    config = ConfigDict(content["config"])
    rows = results.latest(folder)
    table = paper.table_of(config)
    published = [] if table is None else paper.rows(table)
    curves = results.curves(rows)
    drawn = results.curves([row for row in rows if os.path.exists(samples_path(folder, row))])
    metrics = read_metrics(os.path.join(folder, workdir.METRICS))

    sections = []
    if drawn:
        line = max(drawn.values(), key=lambda line: (line[0]["step"], len(line)))
        sections.append(explorer(folder, line, content["class_names"], len(drawn) > 1))
    if curves:
        sections.append(trade_off(curves, results.curves(published, "paper")))
        sections.append(result_tables(curves, rows, published))
    if metrics:
        sections.append(training(metrics))
    page = PAGE.format(
        title=html.escape(Path(folder).resolve().name),
        summary=html.escape(summary(content, rows, metrics)),
        sections="\n".join(sections) or "<p>Nothing is measured yet: train the run, then --mode=sweep.</p>",
        config=html.escape(json.dumps(content["config"], indent=1)),
    )
    path = Path(folder, "report.html")
    workdir.write_atomically(path, page)
    return str(path)


def read_metrics(path: str) -> list[Row]:
    """The lines of metrics.jsonl. Raises ValueError that names a damaged one."""
    rows = []
    for number, line in enumerate(results.whole_lines(path), 1):
        try:
            row = json.loads(line)
            float(row["step"])
            rows.append(row)
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}: line {number} is damaged: delete it, and ask for the report again") from None
    return rows


def summary(content: dict[str, Any], rows: list[Row], metrics: list[Row]) -> str:
    """One sentence on what the run is."""
    data = content["config"]["data"]
    step = metrics[-1]["step"] if metrics else max((row["step"] for row in rows), default=0)
    size = data["image_size"]
    return (
        f"{data['name'] or data['source']}, {size}x{size}, {len(content['class_names'])} classes; "
        f"p_uncond = {content['config']['train']['p_uncond']:g}; {step:,} training steps."
    )


def explorer(folder: str, line: list[Row], class_names: Sequence[str], one_of_many: bool) -> str:
    """A slider over the weights of a curve, and the same images, by seed and class, at each."""
    first = line[0]
    shape = npz.npz_headers(samples_path(folder, first))["arr_0"].shape
    count = int(min(MAX_IMAGES, shape[0], max(1, IMAGE_BYTES // ((len(line) + 1) * math.prod(shape[1:])))))
    classes = labels_of(first["labels"], first["seed"], count, len(class_names))
    columns = [next(npz.npz_batches(samples_path(folder, row), "arr_0", count)) for row in line]
    names = [html.escape(class_names[int(c)]) for c in classes]
    figures = "\n".join(
        f'<figure><img src="{data_uri(image)}" width="{shape[2]}" height="{shape[1]}" alt="{name}, image {i}">'
        f"<figcaption>{name}</figcaption></figure>"
        for i, (image, name) in enumerate(zip(columns[0], names, strict=True))
    )
    states = [
        {
            "w": row["w"],
            "text": f"{row['fid_name']} {results.rounded(row['fid'])}, IS {results.rounded(row['is'])}",
            "images": [data_uri(image) for image in column],
        }
        for row, column in zip(line, columns, strict=True)
    ]
    keys = ("num_steps", "sampler", "v", "guidance", "interval")
    settings = ", ".join(f"{results.SYMBOLS.get(key, key)} = {results.shown(key, first[key])}" for key in keys)
    return EXPLORER.format(
        note=html.escape(settings + (", of the curves below the longest with images" if one_of_many else "")),
        last=len(line) - 1,
        w=f"{first['w']:g}",
        text=html.escape(states[0]["text"]),
        figures=figures,
        states=json.dumps(states).replace("<", "\\u003c"),
    )


def data_uri(image: UInt8[np.ndarray, "h w c"]) -> str:
    """A PNG inside of its own address."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def trade_off(curves: dict[str, list[Row]], published: dict[str, list[Row]]) -> str:
    """FID against IS, and both against w, the paper's beside ours."""
    fid = "/".join(sorted({row["fid_name"] for line in curves.values() for row in line}))
    labels = {"w": "w", "fid": fid, "is": "Inception score"}

    def plot(x: str, y: str) -> str:
        lines = [
            Line(name, [(row[x], row[y], f"w = {row['w']:g}") for row in line], source is published)
            for source in (curves, published)
            for name, line in source.items()
        ]
        return svg_plot(f"{labels[y]} against {labels[x]}", labels[x], labels[y], lines)

    return f"<section><h2>Fidelity and diversity</h2>{plot('is', 'fid')}{plot('w', 'fid')}{plot('w', 'is')}</section>"


def result_tables(curves: dict[str, list[Row]], rows: list[Row], published: list[Row]) -> str:
    """Every measured number, and the paper's table."""
    columns = ("w", *results.MEASURED)
    shown = [key for key in columns if any(row[key] is not None for row in rows)]
    parts = []
    for name, line in curves.items():
        names = [line[0]["fid_name"] if key == "fid" else key.replace("_", " ") for key in shown]
        head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in names)
        body = "".join(
            "<tr>" + "".join(f"<td>{'' if row[key] is None else f'{row[key]:.4g}'}</td>" for key in shown) + "</tr>"
            for row in line
        )
        caption = f"{name}: {line[0]['num_samples']:,} samples, {line[0]['features']} features, step {line[0]['step']}"
        parts.append(
            f'<div class="wide"><table><caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )
    if published:
        parts.append(f'<pre class="wide">{html.escape(results.table({"paper": published}))}</pre>')
    return f"<section><h2>Results</h2>{''.join(parts)}</section>"


def training(metrics: list[Row]) -> str:
    """Loss, throughput and gradient norm against the step, about MAX_POINTS points of each."""
    metrics = metrics[:: math.ceil(len(metrics) / MAX_POINTS)]

    def plot(key: str, label: str) -> str:
        points = [(float(row["step"]), float(row[key]), "") for row in metrics if row.get(key) is not None]
        return svg_plot(f"{label} against step", "step", label, [Line(label, points, False)]) if points else ""

    return (
        f"<section><h2>Training</h2>{plot('loss', 'loss')}{plot('images_per_second', 'images per second')}"
        f"{plot('grad_norm', 'gradient norm')}</section>"
    )


def svg_plot(title: str, x_label: str, y_label: str, lines: list[Line]) -> str:
    """Curves with axes as an SVG of the page's own colours; every point with a text tells it when pointed at."""
    width, height, left, right, top, bottom = 460, 300, 62, 12, 12, 46
    xs = [x for line in lines for x, _, _ in line.points]
    ys = [y for line in lines for _, y, _ in line.points]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))

    def at_x(x: float) -> float:
        return left + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (width - left - right)

    def at_y(y: float) -> float:
        return height - bottom - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (height - top - bottom)

    parts = []
    for x in x_ticks:
        parts.append(f'<path class="grid" d="M{at_x(x):.1f} {top}V{height - bottom}"/>')
        parts.append(f'<text x="{at_x(x):.1f}" y="{height - bottom + 16}" text-anchor="middle">{x:.6g}</text>')
    for y in y_ticks:
        parts.append(f'<path class="grid" d="M{left} {at_y(y):.1f}H{width - right}"/>')
        parts.append(f'<text x="{left - 6}" y="{at_y(y) + 4:.1f}" text-anchor="end">{y:.6g}</text>')
    middle = (top + height - bottom) / 2
    parts.append(f'<text x="{(left + width) / 2}" y="{height - 8}" text-anchor="middle">{html.escape(x_label)}</text>')
    parts.append(
        f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{html.escape(y_label)}</text>'
    )
    legend, ours = [], 0
    for number, line in enumerate(lines):
        style = f"paper p{number % 3}" if line.published else f"ours c{ours % 6}"
        ours += not line.published
        path = "M" + "L".join(f"{at_x(x):.1f} {at_y(y):.1f}" for x, y, _ in line.points)
        parts.append(f'<path class="line {style}" d="{path}"/>')
        parts += [
            f'<circle class="{style}" cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3.5">'
            f"<title>{html.escape(f'{line.name}, {text}: {x:.5g}, {y:.5g}')}</title></circle>"
            for x, y, text in line.points
            if text
        ]
        legend.append(f'<li><span class="key {style}"></span>{html.escape(line.name)}</li>')
    names = f"<ul class=legend>{''.join(legend)}</ul>" if len(lines) > 1 else ""
    return (
        f'<figure class="plot"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">'
        f"{''.join(parts)}</svg>{names}</figure>"
    )


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers, the first at most `low` and the last at least `high`."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


EXPLORER = """<section><h2>Guidance explorer</h2>
<p>The same seeds and classes at every weight. {note}.</p>
<div class="slider"><label for="w">guidance weight</label>
<input id="w" type="range" min="0" max="{last}" step="1" value="0" aria-valuetext="w = {w}">
<output id="said" for="w" aria-live="polite">w = {w}: {text}</output></div>
<div id="images">
{figures}
</div>
<script>
const states = {states};
const slider = document.getElementById("w");
const images = document.querySelectorAll("#images img");
function show() {{
  const state = states[slider.value];
  images.forEach((image, i) => {{ image.src = state.images[i]; }});
  slider.setAttribute("aria-valuetext", "w = " + state.w);
  document.getElementById("said").textContent = "w = " + state.w + ": " + state.text;
}}
function follow() {{
  const w = Number(location.hash.slice(3));
  const i = states.findIndex((state) => state.w === w);
  if (location.hash.startsWith("#w=") && i >= 0) {{ slider.value = i; show(); }}
}}
slider.addEventListener("input", () => {{ show(); history.replaceState(null, "", "#w=" + states[slider.value].w); }});
window.addEventListener("hashchange", follow);
show();
follow();
</script></section>"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
:root {{
  color-scheme: light dark;
  --ink: light-dark(#1b1f24, #e6e9ee); --soft: light-dark(#57606a, #9aa4b0);
  --page: light-dark(#ffffff, #14171b); --rule: light-dark(#d8dee4, #30363d);
  --c0: light-dark(#0b62c4, #6cb0ff); --c1: light-dark(#b3470b, #ff9b62); --c2: light-dark(#1a7f37, #5fd17f);
  --c3: light-dark(#8250df, #c39bff); --c4: light-dark(#a40e45, #ff8fb3); --c5: light-dark(#6b5900, #e0c341);
}}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 62rem; margin: 0 auto; padding: 1rem; }}
h1, h2 {{ line-height: 1.2; }} h2 {{ margin-top: 2.5rem; }}
p.summary, figcaption, caption {{ color: var(--soft); }}
figure {{ margin: 0; }}
.slider {{ position: sticky; top: 0; background: var(--page); padding: .5rem 0; z-index: 1; }}
.slider input {{ display: block; width: 100%; height: 2.2rem; margin: 0; accent-color: var(--c0); }}
output {{ font-variant-numeric: tabular-nums; }}
#images {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(5.2rem, 1fr)); gap: .6rem; }}
#images img {{ width: 100%; height: auto; image-rendering: pixelated; display: block; }}
#images figcaption {{ font-size: .8rem; text-align: center; overflow-wrap: anywhere; }}
.plot {{ display: inline-block; width: 100%; max-width: 30rem; vertical-align: top; }}
svg {{ width: 100%; height: auto; }} svg text {{ fill: var(--soft); font-size: 13px; }}
.grid {{ stroke: var(--rule); }} .line {{ fill: none; stroke: var(--c); stroke-width: 2; }}
circle {{ fill: var(--c); }} .line.paper {{ stroke-dasharray: 5 4; stroke-width: 1.5; }}
.c0 {{ --c: var(--c0); }} .c1 {{ --c: var(--c1); }} .c2 {{ --c: var(--c2); }}
.c3 {{ --c: var(--c3); }} .c4 {{ --c: var(--c4); }} .c5 {{ --c: var(--c5); }}
.p0 {{ --c: light-dark(#6e7781, #aab3bd); }} .p1 {{ --c: light-dark(#8c959f, #8b949e); }}
.p2 {{ --c: light-dark(#a9b1ba, #6e7681); }}
.legend {{ list-style: none; margin: 0; padding: 0 0 0 3rem; font-size: .85rem; }}
.key {{ display: inline-block; width: 1.4em; border-top: 3px solid var(--c);
  margin-right: .5em; vertical-align: middle; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin-bottom: 1.5rem; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; }} th, td {{ padding: .15rem .7rem .15rem 0; text-align: right; }}
tr {{ border-bottom: 1px solid var(--rule); }} pre {{ font-size: .8rem; }}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="summary">{summary}</p>
{sections}
<details><summary>The run's config</summary><pre class="wide">{config}</pre></details>
</main>
</body>
</html>
"""
