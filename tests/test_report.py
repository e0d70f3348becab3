"""The report: what is in the page, how large it is, and that its slider changes the images."""

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

from cfd import npz, paper, report, results, workdir
from cfd.config import describe
from cfd.evaluation import grid, samples_path

WEIGHTS = (0.0, 1.0, 3.0)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def run_folder(folder: Path, config: Any, class_names: list[str], count: int = 20, size: int | None = None) -> Path:
    """A run's folder after a sweep, with pictures of noise."""
    folder.mkdir()
    workdir.write_config(folder, describe("diffusion", config, class_names))
    with open(folder / workdir.METRICS, "w") as file:
        for step in range(1, 1001):
            values = {"loss": None if step == 500 else 1 / step, "images_per_second": 50.0, "grad_norm": 1.0}
            file.write(json.dumps({"step": step, **values}) + "\n")
        file.write('{"step": 1001, "lo')
    (folder / "samples").mkdir()
    shape = (size or config.data.image_size, size or config.data.image_size, config.data.channels)
    for cell in grid(config, 1000):
        numbers = np.random.default_rng([int(10 * cell["w"]), cell["num_steps"]])
        row = cell | {"num_samples": count, "fid_name": results.fid_name(count), "manifest": f"{cell['w']}"}
        measured = {"fid": 3 + cell["w"], "sfid": None, "is": 5 + cell["w"], "precision": 0.5, "recall": 0.25}
        with npz.sample_writer(samples_path(str(folder), row), count, shape) as write:
            write(numbers.integers(0, 256, (count, *shape), np.uint8), np.arange(count) % config.data.num_classes)
        results.append_row(str(folder), row | measured | {"class_accuracy": None})
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run and its report; a class has the name of an attack."""
    names = ["</script><script>document.title='broken'</script>", *"123456789"]
    folder = run_folder(tmp_path_factory.mktemp("report") / "a run & <b>more", tiny_config(), names)
    path = Path(report.report(str(folder)))
    return folder, path.read_text()


def pixels(uri: str) -> np.ndarray:
    prefix = "data:image/png;base64,"
    assert uri.startswith(prefix)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri[len(prefix) :]))))


def states_of(text: str) -> list[dict[str, Any]]:
    match = re.search(r"const states = (.*);\n", text)
    assert match
    return json.loads(match[1])


def test_the_explorer_holds_the_images_of_every_weight(page: tuple[Path, str]) -> None:
    folder, text = page
    states = states_of(text)
    assert [state["w"] for state in states] == list(WEIGHTS)
    for state, row in zip(states, results.read_rows(str(folder)), strict=True):
        drawn = npz.read_npz(samples_path(str(folder), row))["arr_0"]
        assert len(state["images"]) == 20
        for uri, image in zip(state["images"], drawn, strict=True):
            np.testing.assert_array_equal(pixels(uri), image[..., 0])
        assert state["text"] == f"FID-20 {3 + row['w']:.2f}, IS {5 + row['w']:.2f}"


def points(text: str, title: str) -> list[tuple[float, ...]]:
    """(x, y) of every point of a plot, as it is told when pointed at."""
    match = re.search(rf'aria-label="{re.escape(title)}">(.*?)</svg>', text, re.DOTALL)
    assert match
    return [tuple(map(float, told.split(", "))) for told in re.findall(r": ([^:<]*)</title>", match[1])]


def test_the_curves_are_of_what_their_axes_say(page: tuple[Path, str]) -> None:
    _, text = page
    assert points(text, "FID-20 against Inception score") == [(5 + w, 3 + w) for w in WEIGHTS]
    assert points(text, "FID-20 against w") == [(w, 3 + w) for w in WEIGHTS]
    assert points(text, "Inception score against w") == [(w, 5 + w) for w in WEIGHTS]


def test_a_plot_has_more_to_the_right_and_higher_up() -> None:
    line = report.Line("a", [(0.0, 1.0, "p"), (1.0, 3.0, "q")], False)
    plot = report.svg_plot("y against x", "x", "y", [line])
    (x0, y0), (x1, y1) = (map(float, at) for at in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', plot))
    assert x0 < x1 and y0 > y1


def test_the_explorer_shows_the_curve_of_most_weights(tmp_path: Path) -> None:
    config = tiny_config(eval__weights=WEIGHTS, eval__num_steps=(4, 5))
    folder = run_folder(tmp_path / "run", config, list("0123456789"))
    Path(samples_path(str(folder), results.read_rows(str(folder))[0])).unlink()
    text = Path(report.report(str(folder))).read_text()
    assert [state["w"] for state in states_of(text)] == list(WEIGHTS)
    assert "T = 5" in text and "of the curves below the longest with images" in text


def test_numbers_outlive_their_images(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", tiny_config(eval__weights=WEIGHTS), list("0123456789"))
    first, *others = results.read_rows(str(folder))
    whole = Path(report.report(str(folder))).read_text()
    Path(samples_path(str(folder), first)).unlink()
    text = Path(report.report(str(folder))).read_text()
    assert [state["w"] for state in states_of(text)] == [row["w"] for row in others]
    after = "<h2>Fidelity and diversity</h2>"
    assert text.split(after)[1] == whole.split(after)[1]
    for row in others:
        Path(samples_path(str(folder), row)).unlink()
    text = Path(report.report(str(folder))).read_text()
    assert "const states" not in text and text.split(after)[1] == whole.split(after)[1]


def test_the_page_needs_nothing_else(page: tuple[Path, str]) -> None:
    _, text = page
    assert not re.search(r"https?://|url\(|@import|<iframe|<object", text)
    assert set(re.findall(r'(?:src|href)="([a-z]+:)', text)) == {"data:"}
    assert len(re.findall(r"<script", text)) == 1 and "&lt;/script&gt;" in text
    assert "a run &amp; &lt;b&gt;more" in text
    assert '<meta name="viewport"' in text and 'lang="en"' in text and "color-scheme: light dark" in text


def test_everything_has_a_name_for_those_who_do_not_see_it(page: tuple[Path, str]) -> None:
    _, text = page
    assert '<label for="w">' in text and "aria-valuetext" in text and "aria-live" in text
    assert all('alt="' in image for image in re.findall(r"<img [^>]*>", text))
    labels = re.findall(r'<svg [^>]*aria-label="([^"]*)"', text)
    assert labels == [
        "FID-20 against Inception score",
        "FID-20 against w",
        "Inception score against w",
        "loss against step",
        "images per second against step",
        "gradient norm against step",
    ]
    assert "nan" not in " ".join(re.findall(r' d="([^"]*)"', text)).lower()


def test_the_papers_curves_are_there_where_the_config_is_the_papers(tmp_path: Path) -> None:
    config = read_config(ROOT / "configs" / "imagenet64.py")
    config.eval.weights = WEIGHTS
    folder = run_folder(tmp_path / "run", config, [f"class {i}" for i in range(1000)], count=2, size=8)
    text = Path(report.report(str(folder))).read_text()
    for p_uncond in paper.TABLE_1.columns:
        assert f"paper, p_uncond = {p_uncond}" in text
    assert "1.55 / 1.62 / 1.91" in text


def test_a_large_run_stays_below_ten_megabytes(tmp_path: Path) -> None:
    """The paper's 41 weights at 128x128, of noise, which PNG cannot pack."""
    config = read_config(ROOT / "configs" / "imagenet128.py")
    config.eval.weights = tuple(i / 10 for i in range(41))
    folder = run_folder(tmp_path / "run", config, [f"class {i}" for i in range(1000)], count=4)
    path = Path(report.report(str(folder)))
    assert len(states_of(path.read_text())[0]["images"]) == 2
    assert path.stat().st_size < 10_000_000


def test_a_run_without_results_still_has_a_page(tmp_path: Path) -> None:
    workdir.write_config(tmp_path, describe("diffusion", tiny_config(), list("0123456789")))
    assert "Nothing is measured yet" in Path(report.report(str(tmp_path))).read_text()
    with pytest.raises(ValueError, match="is not the folder of a run"):
        report.report(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("line", ["{", "3", '{"loss": 1.0}'])
def test_a_damaged_line_of_the_metrics_is_named(tmp_path: Path, line: str) -> None:
    workdir.write_config(tmp_path, describe("diffusion", tiny_config(), list("0123456789")))
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is damaged: delete it"):
        report.report(str(tmp_path))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3e-5, 2e5), (7.0, 7.0), (0.0, 0.0), (1.23, 1.24)])
def test_ticks_are_few_and_around_all_points(low: float, high: float) -> None:
    found = report.ticks(low, high)
    assert 2 <= len(found) <= 9
    rounding = 1e-6 * (found[-1] - found[0])
    assert found[0] <= low + rounding and high <= found[-1] + rounding


def dom(path: Path, profile: Path, fragment: str = "") -> str:
    """The page's elements after its scripts have run, by a browser without a window."""
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
    move = "<script>slider.value = 1; slider.dispatchEvent(new Event('input'));</script>"
    moved = folder / "moved.html"
    moved.write_text(text.replace("</body>", move + "</body>"))
    for path, fragment, chosen in (
        (folder / "report.html", "", 0),
        (folder / "report.html", "#w=3", 2),
        (moved, "", 1),
    ):
        shown = dom(path, tmp_path / f"profile{chosen}", fragment)
        images = re.findall(r'<img [^>]*src="([^"]*)"', shown) or re.findall(r'<img src="([^"]*)"', shown)
        assert images == states[chosen]["images"]
        assert f'aria-valuetext="w = {states[chosen]["w"]:g}"' in shown
        assert f"w = {states[chosen]['w']:g}: {states[chosen]['text']}</output>" in shown
        assert "<title>a run &amp; &lt;b&gt;more</title>" in shown, "a name of a class is never a script"
