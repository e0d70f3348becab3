"""`--mode=report`: one self-contained page about a run.

The page has a slider that shows the same seeds and classes at every weight of a sweep, the curves, the tables, the
nearest training images and the config. Pictures are PNG and SVG in data URIs, and the only script is the slider's few
lines.
"""

import base64
import html
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cfd.errors import UserError
from cfd.evaluation.nearest import Nearest, read_nearest
from cfd.modes import emas, figures, settings, tables
from cfd.runs import files, log, npz, results, workdir
from cfd.runs.results import Row, samples_path

IMAGE_BYTES = 4_200_000
PAIR_BYTES = 1_200_000
FRONTS_BYTES = 1_200_000
"""Bytes of the slider's images, of the nearest images and of fronts.png, before base64: the page stays below 10 MB."""
MAX_IMAGES = 20
OPEN_CLASSES = 20
"""A table of more classes is folded."""


def report(folder: str, out: str) -> str:
    """Write report.html about the run in `folder` to the folder `out`, and return its path.

    The sweep is the one in `out`, or the run's if there is none. Raises ValueError if `folder` holds no run.
    """
    content = workdir.read_config(folder)
    swept = results.swept_folder(folder, out)
    rows = results.latest(swept)
    means = tables.over_seeds(swept, rows)
    curves, floor = tables.curves(means), tables.floor_of(swept, rows)
    present = set(files.names(files.place(swept, "samples")))
    with_images = tables.curves([row for row in rows if os.path.basename(samples_path(swept, row)) in present])
    metrics = read_metrics(os.path.join(folder, log.METRICS))

    names: list[str] = content["class_names"]
    sections = []
    if with_images:
        sections.append(explorer(swept, tables.longest(with_images), names, len(with_images) > 1))
    if curves:
        published = tables.published_of(settings.config_of_run(folder), names)
        real = tables.real_fid(floor, rows)
        sections.append(trade_off(curves, published, real))
        if "step" in tables.varied(means):
            figure = figures.curve_figure(tables.curves(means, axis="step"), {}, axis="step", real=real)
            picture = image_tag(figure, "FID and Inception score against step")
            sections.append(f"<section><h2>Steps</h2>{picture}</section>")
        if "ema" in tables.varied(means):
            picture = image_tag(emas.figure(means, real), "FID over the length of the EMA and w")
            sections.append(f"<section><h2>EMA lengths</h2>{picture}</section>")
        sections += [
            fronts(swept),
            result_tables(curves, means, published, tables.real_images(floor, rows[0]["features"])),
        ]
        sections.append(class_table(swept, tables.longest(tables.curves(rows)), names))
    if (nearest := read_nearest(swept)) is not None:
        sections.append(nearest_images(nearest, rows, names))
    if metrics:
        picture = image_tag(figures.training_figure(metrics), "loss, images per second and gradient norm against step")
        sections.append(f"<section><h2>Training</h2>{picture}</section>")
    page = PAGE.format(
        title=html.escape(title_of(folder)),
        summary=html.escape(summary(content, rows, metrics)),
        sections="\n".join(filter(None, sections))
        or "<p>Nothing is measured yet: train the run, then --mode=sweep.</p>",
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
            if row["step"] is None or not all(value is None or math.isfinite(value) for value in row.values()):
                raise ValueError
            rows.append(row)
        except (ValueError, TypeError, KeyError, OverflowError):
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
    shape = npz.npz_headers(samples_path(folder, first), remedy=results.WITHOUT_SAMPLES)["arr_0"].shape
    count = int(min(MAX_IMAGES, shape[0], max(1, IMAGE_BYTES // ((len(line) + 1) * math.prod(shape[1:])))))
    classes: list[int] = results.first_samples(folder, first, "arr_1", count).tolist()
    columns = [results.first_samples(folder, row, "arr_0", count) for row in line]
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
            "text": ", ".join(
                f"{name} {tables.rounded(row[key])}"
                for name, key in ((row["fid_name"], "fid"), ("IS", "is"))
                if row[key] is not None
            ),
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


def trade_off(curves: dict[str, list[Row]], published: tables.Published, real: figures.Interval | None = None) -> str:
    """FID against Inception Score, and both against w, with published results and FID of real images."""
    theirs = tables.curves(published.rows, "paper")
    figure = figures.curve_figure(curves, theirs, real=real, baselines=published.baselines)
    picture = image_tag(figure, "FID against Inception score, and both against w")
    return f"<section><h2>Fidelity and diversity</h2>{picture}</section>"


def image_tag(figure: Any, description: str) -> str:
    """A matplotlib figure as an image inside the page."""
    return f'<img class="plot" src="{figures.svg_uri(figure)}" alt="{html.escape(description)}">'


def fronts(folder: str) -> str:
    """The comparison of rules and guides in this folder, from fronts.png and matched.md, if they exist.

    A picture that would make the page too large is named instead.
    """
    parts = []
    picture, text = (files.read_bytes(os.path.join(folder, name)) for name in ("fronts.png", "matched.md"))
    if picture is not None and len(picture) > FRONTS_BYTES:
        parts.append(f"<p>fronts.png has {len(picture):,} bytes and is not on this page.</p>")
    elif picture is not None:
        uri = "data:image/png;base64," + base64.b64encode(picture).decode()
        parts.append(f'<img class="plot" src="{uri}" alt="what each rule and guide trades for what, as w grows">')
    if text is not None:
        parts.append(markdown_in_html(text.decode(errors="replace")))
    return f"<section><h2>Rules and guides</h2>{''.join(parts)}</section>" if parts else ""


def markdown_in_html(text: str) -> str:
    """Headings, tables and paragraphs of Markdown as `cfd.modes.tables.markdown` writes it."""
    parts = []
    for block in filter(None, map(str.strip, re.split(r"\n\s*\n", text))):
        if block.startswith("#"):
            parts.append(f"<h3>{html.escape(block.lstrip('# '))}</h3>")
        elif block.startswith("|"):
            head, _, *body = [
                [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
                for line in block.splitlines()
            ]
            parts.append(table_of(head, body))
        else:
            parts.append(f"<p>{html.escape(block)}</p>")
    return "".join(parts)


def table_of(head: Sequence[str], body: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table of texts. The first column heads the rows."""
    top = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in head)
    rows = "".join(
        f'<tr><th scope="row">{html.escape(first)}</th>'
        + "".join(f"<td>{html.escape(text)}</td>" for text in rest)
        + "</tr>"
        for first, *rest in body
    )
    said = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{said}<thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table></div>'


def result_tables(curves: dict[str, list[Row]], rows: list[Row], published: tables.Published, of_real: str = "") -> str:
    """Every measured number with its interval, `of_real` about real images, and published results."""
    present = [key for key in results.MEASURED if any(row[key] is not None for row in rows)]
    parts = []
    for name, line in curves.items():
        head = ["w", *(tables.measure_name(key, line).replace("_", " ") for key in present)]
        body = [[f"{row['w']:g}", *(tables.with_interval(row, key) for key in present)] for row in line]
        caption = f"{name}: {line[0]['num_samples']:,} samples, {line[0]['features']} features, step {line[0]['step']}"
        parts.append(table_of(head, body, caption))
    said = "\n".join(filter(None, [tables.caption(rows), of_real]))
    parts += [f"<p>{html.escape(line)}</p>" for line in said.splitlines() if line.strip()]
    if published.rows:
        parts.append(f'<pre class="wide">{html.escape(tables.table({"paper": published.rows}))}</pre>')
    parts.append(markdown_in_html(tables.literature(published)))
    return f"<section><h2>Results</h2>{''.join(parts)}</section>"


def class_table(folder: str, line: list[Row], class_names: Sequence[str]) -> str:
    """The measures of each class at the smallest and at the largest weight of a curve."""
    measured = {f"w = {row['w']:g}": results.read_classes(folder, row) for row in (line[0], line[-1])}
    measured = {where: {row["class"]: row for row in rows} for where, rows in measured.items() if rows}
    if not measured:
        return ""
    shown = {"class_accuracy": tables.NAMES["class_accuracy"], "precision": "precision"}
    columns = [
        (f"{name}, {where}", key, classes)
        for key, name in shown.items()
        for where, classes in measured.items()
        if any(row.get(key) is not None for row in classes.values())
    ]
    first = next(iter(measured.values()))
    numbers = sorted(set().union(*measured.values()))
    head = ["class", "images", *(name for name, _, _ in columns)]
    body = [
        [class_names[c] if 0 <= c < len(class_names) else str(c), f"{first.get(c, {}).get('images', 0):,}"]
        + [share(classes.get(c, {}).get(key)) for _, key, classes in columns]
        for c in numbers
    ]
    what = f"{len(numbers)} classes; {line[0]['num_samples']:,} samples at each weight"
    is_open = " open" if len(numbers) <= OPEN_CLASSES else ""
    return (
        f"<section><h2>Classes</h2><details{is_open}><summary>{html.escape(what)}</summary>{table_of(head, body)}"
        "</details></section>"
    )


def share(value: float | None) -> str:
    """A share of images to three decimals; "–" if it is not measured."""
    return "–" if value is None else f"{value:.3f}"


def nearest_images(nearest: Nearest, rows: list[Row], class_names: Sequence[str]) -> str:
    """Pairs of a sample and its nearest training image, with their distance; "" if the sweep has other rows now."""
    features = {row["manifest"]: row["features"] for row in rows}
    kept = [r for r, name in enumerate(nearest.manifests) if name in features]
    if not kept:
        return ""
    shape = nearest.samples.shape[2:]
    count = min(nearest.samples.shape[1], max(1, PAIR_BYTES // (2 * len(kept) * math.prod(shape))))

    def image(pixels: Any, what: str) -> str:
        return f'<img src="{figures.png_uri(pixels)}" width="{shape[1]}" height="{shape[0]}" alt="{what}">'

    def name(label: int) -> str:
        return html.escape(class_names[label]) if 0 <= label < len(class_names) else "no class"

    parts = []
    for r in kept:
        pairs = "".join(
            "<figure><div>"
            + image(nearest.samples[r, i], f"sample {i}, {name(int(nearest.labels[r, i]))}")
            + image(
                nearest.nearest[r, i],
                f"training image {nearest.index[r, i]}, {name(int(nearest.nearest_labels[r, i]))}",
            )
            + f"</div><figcaption>{nearest.distance[r, i]:.3g}</figcaption></figure>"
            for i in range(count)
        )
        parts.append(f'<h3>w = {nearest.w[r]:g}</h3><div class="pairs">{pairs}</div>')
    searched, total = nearest.searched.tolist()
    among = f"all {total:,} training images" if searched == total else f"{searched:,} of {total:,} training images"
    low, middle, high = nearest.typical
    return (
        "<section><h2>Nearest training images</h2><p>Left: a sample. Right: the nearest of "
        f"{among} in the {html.escape(features[nearest.manifests[kept[0]]])} features. Below: their distance. For "
        f"comparison, the distance from a training image to the nearest other one is {middle:.3g} in the median, and "
        f"between {low:.3g} and {high:.3g} for 90 % of them.</p>{''.join(parts)}</section>"
    )


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
.pairs {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .8rem; }}
.pairs div {{ display: grid; grid-template-columns: 1fr 1fr; gap: .2rem; }}
.pairs img {{ width: 100%; height: auto; image-rendering: pixelated; display: block; }}
.pairs figcaption {{ font-size: .8rem; text-align: center; }}
.plot {{ width: 100%; height: auto; background: #ffffff; border-radius: .3rem; }}
@media (prefers-color-scheme: dark) {{ .plot {{ filter: invert(.92) hue-rotate(180deg); }} }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin-bottom: 1.5rem; font-size: .85rem; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; }} th, td {{ padding: .15rem 0 .15rem .75rem; text-align: right; white-space: nowrap; }}
thead th {{ white-space: normal; vertical-align: bottom; }}
th:first-child {{ text-align: left; padding-left: 0; }} tbody th {{ font-weight: normal; }}
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
