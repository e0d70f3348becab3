"""`--mode=report`: one self-contained page about a run.

The page has a slider that shows the same seeds and classes at every weight of a sweep, the curves, the table and the
config. Pictures are PNG and SVG in data URIs, and the only script is the slider's few lines.
"""

import html
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cfd.errors import UserError
from cfd.modes import figures, settings, tables
from cfd.runs import files, log, npz, results, workdir
from cfd.runs.results import Row, samples_path

IMAGE_BYTES = 5_000_000
"""Bytes of all pictures before PNG and base64, which keeps the page below 10 MB."""
MAX_IMAGES = 20


def report(folder: str, out: str) -> str:
    """Write report.html about the run in `folder` to the folder `out`, and return its path.

    The sweep is the one in `out`, or the run's if there is none. Raises ValueError if `folder` holds no run.
    """
    content = workdir.read_config(folder)
    swept = results.swept_folder(folder, out)
    rows = results.latest(swept)
    curves = tables.curves(rows)
    present = set(files.names(files.place(swept, "samples")))
    with_images = tables.curves([row for row in rows if os.path.basename(samples_path(swept, row)) in present])
    metrics = read_metrics(os.path.join(folder, log.METRICS))

    sections = []
    if with_images:
        line = max(with_images.values(), key=lambda line: (line[0]["step"], len(line)))
        sections.append(explorer(swept, line, content["class_names"], len(with_images) > 1))
    if curves:
        published = tables.published_rows(settings.config_of_run(folder), len(content["class_names"]))
        sections.append(trade_off(curves, tables.curves(published, "paper")))
        if "step" in tables.varied(rows):
            figure = figures.curve_figure(tables.curves(rows, axis="step"), {}, axis="step")
            picture = image_tag(figure, "FID and Inception score against step")
            sections.append(f"<section><h2>Steps</h2>{picture}</section>")
        sections.append(result_tables(curves, rows, published))
    if metrics:
        picture = image_tag(figures.training_figure(metrics), "loss, images per second and gradient norm against step")
        sections.append(f"<section><h2>Training</h2>{picture}</section>")
    page = PAGE.format(
        title=html.escape(title_of(folder)),
        summary=html.escape(summary(content, rows, metrics)),
        sections="\n".join(sections) or "<p>Nothing is measured yet: train the run, then --mode=sweep.</p>",
        config=html.escape(json.dumps(content["config"], indent=1)),
    )
    path = os.path.join(out, "report.html")
    files.write_atomically(path, page)
    return path


def title_of(folder: str) -> str:
    """The name of a run's folder; of a link, that of the folder to which it leads."""
    path = files.place(folder)
    return path.resolve().name if isinstance(path, Path) else path.name


def read_metrics(path: str) -> list[Row]:
    """The lines of metrics.jsonl. Raises ValueError, naming the line, if one is damaged."""
    rows = []
    for number, line in enumerate(results.whole_lines(path), 1):
        try:
            row = json.loads(line)
            float(row["step"])
            rows.append(row)
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}: line {number} is damaged: delete it, and ask for the report again") from None
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
    """A slider over the weights of a curve, and the same images, by seed and class, at each weight."""
    first = line[0]
    shape = npz.npz_headers(samples_path(folder, first))["arr_0"].shape
    count = int(min(MAX_IMAGES, shape[0], max(1, IMAGE_BYTES // ((len(line) + 1) * math.prod(shape[1:])))))
    classes: list[int] = next(npz.npz_batches(samples_path(folder, first), "arr_1", count)).tolist()
    columns = [next(npz.npz_batches(samples_path(folder, row), "arr_0", count)) for row in line]
    # An unconditional network has no classes of its own. Its images have -1, or a class of the classifier that guides.
    names = [html.escape(class_names[c]) if 0 <= c < len(class_names) else "" for c in classes]
    images = "\n".join(
        f'<figure><img src="{figures.png_uri(image)}" width="{shape[2]}" height="{shape[1]}" alt="{name}, image {i}">'
        f"<figcaption>{name}</figcaption></figure>"
        for i, (image, name) in enumerate(zip(columns[0], names, strict=True))
    )
    states = [
        {
            "w": row["w"],
            "text": f"{row['fid_name']} {tables.rounded(row['fid'])}, IS {tables.rounded(row['is'])}",
            "images": [figures.png_uri(image) for image in column],
        }
        for row, column in zip(line, columns, strict=True)
    ]
    keys = ("step", "num_steps", "sampler", "v", "guidance", "interval")
    settings = ", ".join(f"{tables.SYMBOLS.get(key, key)} = {tables.in_words(key, first[key])}" for key in keys)
    return EXPLORER.format(
        note=html.escape(settings + (", the longest of the curves below that has images" if one_of_many else "")),
        last=len(line) - 1,
        w=f"{first['w']:g}",
        text=html.escape(states[0]["text"]),
        figures=images,
        states=json.dumps(states).replace("<", "\\u003c"),
    )


def trade_off(curves: dict[str, list[Row]], published: dict[str, list[Row]]) -> str:
    """FID against Inception Score, and both against w, with the paper's curves."""
    picture = image_tag(figures.curve_figure(curves, published), "FID against Inception score, and both against w")
    return f"<section><h2>Fidelity and diversity</h2>{picture}</section>"


def image_tag(figure: Any, description: str) -> str:
    """A matplotlib figure as an image inside the page."""
    return f'<img class="plot" src="{figures.svg_uri(figure)}" alt="{html.escape(description)}">'


def result_tables(curves: dict[str, list[Row]], rows: list[Row], published: list[Row]) -> str:
    """Every measured number, and the paper's table."""
    columns = ("w", *results.MEASURED)
    present = [key for key in columns if any(row[key] is not None for row in rows)]
    parts = []
    for name, line in curves.items():
        names = [line[0]["fid_name"] if key == "fid" else key.replace("_", " ") for key in present]
        head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in names)
        body = "".join(
            "<tr>" + "".join(f"<td>{'' if row[key] is None else f'{row[key]:.4g}'}</td>" for key in present) + "</tr>"
            for row in line
        )
        caption = f"{name}: {line[0]['num_samples']:,} samples, {line[0]['features']} features, step {line[0]['step']}"
        parts.append(
            f'<div class="wide"><table><caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )
    if published:
        parts.append(f'<pre class="wide">{html.escape(tables.table({"paper": published}))}</pre>')
    return f"<section><h2>Results</h2>{''.join(parts)}</section>"


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
  --accent: light-dark(#0b62c4, #6cb0ff);
}}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 62rem; margin: 0 auto; padding: 1rem; }}
h1, h2 {{ line-height: 1.2; }} h2 {{ margin-top: 2.5rem; }}
p.summary, figcaption, caption {{ color: var(--soft); }}
figure {{ margin: 0; }}
.slider {{ position: sticky; top: 0; background: var(--page); padding: .5rem 0; z-index: 1; }}
.slider input {{ display: block; width: 100%; height: 2.2rem; margin: 0; accent-color: var(--accent); }}
output {{ font-variant-numeric: tabular-nums; }}
#images {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(5.2rem, 1fr)); gap: .6rem; }}
#images img {{ width: 100%; height: auto; image-rendering: pixelated; display: block; }}
#images figcaption {{ font-size: .8rem; text-align: center; overflow-wrap: anywhere; }}
.plot {{ width: 100%; height: auto; background: #ffffff; border-radius: .3rem; }}
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
