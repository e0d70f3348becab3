"""The report: the content of the page, its size, and the slider that changes the images."""

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import ROOT, read_config, tiny_config

from cfd.config import complete, with_classes
from cfd.evaluation import paper
from cfd.modes import figures, tables
from cfd.modes.report import report
from cfd.modes.sweep import rows_of_grid
from cfd.runs import log, npz, results, workdir
from cfd.runs.results import samples_path

WEIGHTS = (0.0, 1.0, 3.0)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def run_folder(folder: Path, config: Any, class_names: list[str], count: int = 20, size: int | None = None) -> Path:
    """The folder of a run after a sweep whose images are noise."""
    folder.mkdir()
    workdir.write_config(folder, workdir.describe("diffusion", config.to_dict(), class_names))
    with open(folder / log.METRICS, "w") as file:
        for step in range(1, 1001):
            values = {"loss": None if step == 500 else 1 / step, "images_per_second": 50.0, "grad_norm": 1.0}
            file.write(json.dumps({"step": step, **values}) + "\n")
        file.write('{"step": 1001, "lo')
    (folder / "samples").mkdir()
    shape = (size or config.data.image_size, size or config.data.image_size, config.data.channels)
    for cell in rows_of_grid(config, 1000):
        numbers = np.random.default_rng([int(10 * cell["w"]), cell["num_steps"]])
        row = cell | {"num_samples": count, "fid_name": results.fid_name(count), "manifest": f"{cell['w']}"}
        measured = {"fid": 3 + cell["w"], "sfid": None, "is": 5 + cell["w"], "precision": 0.5, "recall": 0.25}
        with npz.sample_writer(samples_path(str(folder), row), count, shape) as write:
            write(numbers.integers(0, 256, (count, *shape), np.uint8), np.arange(count) % config.data.num_classes)
        results.append_row(str(folder), row | measured | {"class_accuracy": None})
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run and its report. The name of one class is an attack on the page."""
    names = ["</script><script>document.title='broken'</script>", *"123456789"]
    folder = run_folder(tmp_path_factory.mktemp("report") / "a run & <b>more", tiny_config(), names)
    return folder, Path(report(str(folder), str(folder))).read_text()


def pixels(uri: str) -> np.ndarray:
    prefix = "data:image/png;base64,"
    assert uri.startswith(prefix)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri[len(prefix) :]))))


def states_of(text: str) -> list[dict[str, Any]]:
    match = re.search(r"const states = (.*);\n", text)
    assert match
    return json.loads(match[1])


def test_the_explorer_has_the_images_of_every_weight(page: tuple[Path, str]) -> None:
    folder, text = page
    states = states_of(text)
    assert [state["w"] for state in states] == list(WEIGHTS)
    for state, row in zip(states, results.read_rows(str(folder)), strict=True):
        images = npz.read_npz(samples_path(str(folder), row))["arr_0"]
        assert len(state["images"]) == 20
        for uri, image in zip(state["images"], images, strict=True):
            np.testing.assert_array_equal(pixels(uri), image[..., 0])
        assert state["text"] == f"FID-20 {3 + row['w']:.2f}, IS {5 + row['w']:.2f}"


def plots_of(text: str) -> list[tuple[str, str]]:
    """(data URI, description) of every plot of a page."""
    return re.findall(r'<img class="plot" src="([^"]*)" alt="([^"]*)">', text)


def svg_of(uri: str) -> str:
    prefix = "data:image/svg+xml;base64,"
    assert uri.startswith(prefix)
    return base64.b64decode(uri[len(prefix) :]).decode()


def test_the_plots_are_the_figures_of_the_rows_and_of_the_metrics(page: tuple[Path, str]) -> None:
    folder, text = page
    (sweep, _), (training, _) = plots_of(text)
    rows = results.read_rows(str(folder))
    assert sweep == figures.svg_uri(figures.curve_figure(tables.curves(rows), {}))
    lines = [json.loads(line) for line in (folder / log.METRICS).read_text().splitlines()[:1000]]
    assert training == figures.svg_uri(figures.training_figure(lines))


def test_the_explorer_shows_the_curve_of_most_weights(tmp_path: Path) -> None:
    config = tiny_config(eval__weights=WEIGHTS, eval__num_steps=(4, 5))
    folder = run_folder(tmp_path / "run", config, list("0123456789"))
    Path(samples_path(str(folder), results.read_rows(str(folder))[0])).unlink()
    text = Path(report(str(folder), str(folder))).read_text()
    assert [state["w"] for state in states_of(text)] == list(WEIGHTS)
    assert "T = 5" in text and "the longest of the curves below that has images" in text


def test_numbers_outlive_their_images(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", tiny_config(eval__weights=WEIGHTS), list("0123456789"))
    first, *others = results.read_rows(str(folder))
    whole = Path(report(str(folder), str(folder))).read_text()
    Path(samples_path(str(folder), first)).unlink()
    text = Path(report(str(folder), str(folder))).read_text()
    assert [state["w"] for state in states_of(text)] == [row["w"] for row in others]
    after = "<h2>Fidelity and diversity</h2>"
    assert text.split(after)[1] == whole.split(after)[1]
    for row in others:
        Path(samples_path(str(folder), row)).unlink()
    text = Path(report(str(folder), str(folder))).read_text()
    assert "const states" not in text and text.split(after)[1] == whole.split(after)[1]


def test_the_page_needs_nothing_else(page: tuple[Path, str]) -> None:
    _, text = page
    assert not re.search(r"https?://|url\(|@import|<iframe|<object", text)
    assert set(re.findall(r'(?:src|href)="([a-z]+:)', text)) == {"data:"}
    assert len(re.findall(r"<script", text)) == 1 and "&lt;/script&gt;" in text
    assert "a run &amp; &lt;b&gt;more" in text
    assert '<meta name="viewport"' in text and 'lang="en"' in text and "color-scheme: light dark" in text


def test_every_control_and_image_has_a_description(page: tuple[Path, str]) -> None:
    _, text = page
    assert '<label for="w">' in text and "aria-valuetext" in text and "aria-live" in text
    assert all('alt="' in image for image in re.findall(r"<img [^>]*>", text))
    assert [description for _, description in plots_of(text)] == [
        "FID against Inception score, and both against w",
        "loss, images per second and gradient norm against step",
    ]
    for uri, _ in plots_of(text):
        assert "nan" not in " ".join(re.findall(r' d="([^"]*)"', svg_of(uri))).lower()


def config_of(name: str, weights: tuple[float, ...]) -> Any:
    """A config of the package, for 1000 classes, that sweeps other weights."""
    config = read_config(ROOT / "configs" / f"{name}.py")
    config.eval.weights = weights
    return with_classes(complete(config), 1000)


def test_the_papers_curves_are_shown_if_the_config_is_the_papers(tmp_path: Path) -> None:
    config = config_of("imagenet64", WEIGHTS)
    folder = run_folder(tmp_path / "run", config, [f"class {i}" for i in range(1000)], count=2, size=8)
    text = Path(report(str(folder), str(folder))).read_text()
    plot = svg_of(plots_of(text)[0][0])
    for p_uncond in paper.TABLE_1.columns:
        assert f"<!-- paper, p_uncond = {p_uncond} -->" in plot  # Matplotlib writes each text as a comment, too
    assert "1.55 / 1.62 / 1.91" in text


def test_a_large_run_stays_below_ten_megabytes(tmp_path: Path) -> None:
    """41 weights at 128x128, with images of noise, which PNG cannot compress."""
    config = config_of("imagenet128", tuple(i / 10 for i in range(41)))
    folder = run_folder(tmp_path / "run", config, [f"class {i}" for i in range(1000)], count=4)
    path = Path(report(str(folder), str(folder)))
    assert len(states_of(path.read_text())[0]["images"]) == 2
    assert path.stat().st_size < 10_000_000


def test_another_folder_can_be_written_to(tmp_path: Path) -> None:
    """The page is the same, and nothing is added to the run. A sweep in the other folder takes the run's place."""
    folder = run_folder(tmp_path / "run", tiny_config(eval__weights=WEIGHTS), list("0123456789"))
    before, out = sorted(folder.rglob("*")), tmp_path / "new" / "out"
    assert report(str(folder), str(out)) == str(out / "report.html")
    assert sorted(folder.rglob("*")) == before
    assert (out / "report.html").read_text() == Path(report(str(folder), str(folder))).read_text()
    elsewhere = run_folder(tmp_path / "elsewhere", tiny_config(eval__weights=(0.5, 2.0)), list("0123456789"))
    text = Path(report(str(folder), str(elsewhere))).read_text()
    assert [state["w"] for state in states_of(text)] == [0.5, 2.0] and "<h1>run</h1>" in text
    assert "1,000 training steps" in text  # the metrics are the run's


def test_a_run_without_results_still_has_a_page(tmp_path: Path) -> None:
    workdir.write_config(tmp_path, workdir.describe("diffusion", tiny_config().to_dict(), list("0123456789")))
    assert "Nothing is measured yet" in Path(report(str(tmp_path), str(tmp_path))).read_text()
    with pytest.raises(ValueError, match="is not the folder of a run"):
        report(str(tmp_path / "nowhere"), str(tmp_path))


@pytest.mark.parametrize("line", ["{", "3", '{"loss": 1.0}'])
def test_a_damaged_line_of_the_metrics_is_named(tmp_path: Path, line: str) -> None:
    workdir.write_config(tmp_path, workdir.describe("diffusion", tiny_config().to_dict(), list("0123456789")))
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is damaged: delete it"):
        report(str(tmp_path), str(tmp_path))


def dom(path: Path, profile: Path, fragment: str = "") -> str:
    """The elements of a page in a headless browser, after its scripts have run."""
    assert BROWSER
    quiet = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        *quiet,
        f"--user-data-dir={profile}",
        "--dump-dom",
    ]
    done = subprocess.run([*command, f"{path.as_uri()}{fragment}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium: `apt-get install chromium` to test the slider")
def test_the_slider_changes_the_images_in_a_browser(page: tuple[Path, str], tmp_path: Path) -> None:
    folder, text = page
    states = states_of(text)
    move = "slider.value = 1; slider.dispatchEvent(new Event('input'));"
    look = """addEventListener("load", () => {
      const plots = [...document.querySelectorAll("img.plot")];
      document.body.dataset.plots = plots.filter((plot) => plot.naturalWidth > 0).length;
    });"""
    moved = folder / "moved.html"
    moved.write_text(text.replace("</body>", f"<script>{move}{look}</script></body>"))
    for path, fragment, chosen in (
        (folder / "report.html", "", 0),
        (folder / "report.html", "#w=3", 2),
        (moved, "", 1),
    ):
        shown = dom(path, tmp_path / f"profile{chosen}", fragment)
        images = re.findall(r'<img [^>]*src="(data:image/png[^"]*)"', shown)
        assert images == states[chosen]["images"]
        assert f'aria-valuetext="w = {states[chosen]["w"]:g}"' in shown
        assert f"w = {states[chosen]['w']:g}: {states[chosen]['text']}</output>" in shown
        assert "<title>a run &amp; &lt;b&gt;more</title>" in shown, "the name of a class is never run as a script"
        assert ('data-plots="2"' in shown) == (path == moved), "the browser can draw both plots"
