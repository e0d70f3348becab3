"""The report: the content of the page, its size, and the slider that changes the images."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import ROOT, read_config, tiny_config

from cfd.config import complete, with_classes
from cfd.evaluation import paper
from cfd.evaluation.nearest import nearest_path
from cfd.modes import figures, tables
from cfd.modes.report import FRONTS_BYTES, report
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
        row = cell | {
            "num_samples": count,
            "fid_name": results.fid_name(count, "classifier"),
            "manifest": f"{cell['w']}",
        }
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
    for result in (*paper.BASELINES["imagenet", 64], *paper.OTHERS["imagenet", 64][:4]):
        assert f'<th scope="row">{html.escape(result.method)}</th><td>{result.fid:.2f}</td>' in text
    assert "<!-- CDM -->" in plot


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


def test_damaged_samples_are_named_with_a_remedy_that_works(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", tiny_config(eval__weights=WEIGHTS), list("0123456789"))
    for row in (results.latest(str(folder))[i] for i in (0, -1)):
        path = Path(samples_path(str(folder), row))
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(ValueError, match=rf"{path.name} is not a sound .*: remove the file, and the images of"):
            report(str(folder), str(folder))
        path.unlink()
    text = Path(report(str(folder), str(folder))).read_text()
    assert [state["w"] for state in states_of(text)] == list(WEIGHTS[1:-1])


def test_the_explorer_names_the_measures_that_there_are(tmp_path: Path) -> None:
    """DINOv2 gives no Inception score."""
    folder = run_folder(tmp_path / "run", tiny_config(eval__weights=WEIGHTS), list("0123456789"))
    rows = results.read_rows(str(folder))
    (folder / "sweep.csv").unlink()
    for row in rows:
        results.append_row(str(folder), row | {"is": None})
    states = states_of(Path(report(str(folder), str(folder))).read_text())
    assert [state["text"] for state in states] == [f"FID-20 {3 + w:.2f}" for w in WEIGHTS]


def test_a_run_without_results_still_has_a_page(tmp_path: Path) -> None:
    workdir.write_config(tmp_path, workdir.describe("diffusion", tiny_config().to_dict(), list("0123456789")))
    assert "Nothing is measured yet" in Path(report(str(tmp_path), str(tmp_path))).read_text()
    with pytest.raises(ValueError, match="is not the folder of a run"):
        report(str(tmp_path / "nowhere"), str(tmp_path))


@pytest.mark.parametrize(
    "line", ["{", "3", '{"loss": 1.0}', '{"step": 2, "loss": []}', '{"step": 2, "loss": "1"}', '{"step": NaN}']
)
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


def tables_of(text: str) -> list[list[list[str]]]:
    """The cells of every table of a page, row by row."""
    return [
        [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)]
        for table in re.findall(r"<table>(.*?)</table>", text, re.DOTALL)
    ]


def write_nearest(folder: Path, manifests: list[str], images: np.ndarray) -> None:
    """nearest.npz, in which the nearest image of each is its negative, at the distance of its number."""
    shape = images.shape[:2]
    arrays = {
        "manifests": np.stack([np.frombuffer(name.encode().ljust(16), np.uint8) for name in manifests]),
        "w": np.arange(len(manifests)).astype(float),
        "labels": np.zeros(shape, np.int64),
        "samples": images,
        "nearest": 255 - images,
        "nearest_labels": np.ones(shape, np.int64),
        "index": np.full(shape, 77),
        "distance": np.arange(images.shape[0] * images.shape[1]).reshape(shape) + 0.25,
        "typical": np.array([1.5, 2.5, 3.5]),
        "searched": np.array([1000, 50_000]),
    }
    npz.write_npz(nearest_path(str(folder)), arrays)


def test_the_sections_that_a_sweep_and_a_comparison_add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals, real images, classes, nearest images, and the text of compare; names are never read as HTML."""
    names = ["<b>zero</b>", *"123456789"]
    folder = run_folder(tmp_path / "run", tiny_config(), names)
    rows = results.read_rows(str(folder))
    (folder / "sweep.csv").unlink()
    for row in rows:
        results.append_row(str(folder), row | {"fid_low": row["fid"] - 1, "fid_high": row["fid"] + 1})
    for row, accuracy in ((rows[0], 0.25), (rows[-1], 0.75)):
        lines = [{"class": c, "images": 2, "class_accuracy": accuracy, "precision": None} for c in (0, 9)]
        results.write_classes(str(folder), row["manifest"], lines)
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 1), np.uint8)
    write_nearest(folder, ["0.0", "gone"], images)
    head, body = ["rule", "w"], [["apg(eta=0.5) | <x>", "0.3"]]
    (folder / "matched.md").write_text(f"### At w = 1 & more\n\n{tables.markdown(head, body)}\n\nRead so.\n")
    figures.save(str(folder / "fronts.png"), np.zeros((4, 6, 3), np.uint8))
    of_real = {"mean": 2.0, "sd": 0.1, "low": 1.8, "high": 2.2}
    floor = dict(num_samples=20, draws=7, fid=of_real, kid=None, held_out=None, saturation=0.125)
    monkeypatch.setattr(tables, "floor_of", lambda *_: floor)
    text = Path(report(str(folder), str(folder))).read_text()

    matched, measured, classes = tables_of(text)
    assert matched == [["rule", "w"], ["apg(eta=0.5) | &lt;x&gt;", "0.3"]]
    assert "<h3>At w = 1 &amp; more</h3>" in text and "<p>Read so.</p>" in text
    assert [row[1] for row in measured] == ["FID-20", "3.00 ± 1.00", "4.00 ± 1.00", "6.00 ± 1.00"]
    assert "FID-20 2.00 ± 0.20" in text and "Saturation of the reference: 0.125" in text and "7 draws" in text
    assert classes[0] == ["class", "images", "asked class, w = 0", "asked class, w = 3"]
    assert classes[1:] == [["&lt;b&gt;zero&lt;/b&gt;", "2", "0.250", "0.750"], ["9", "2", "0.250", "0.750"]]
    assert "<b>zero" not in text.replace(json.dumps(names), "")

    pairs = re.findall(r"<figure><div>(.*?)</div><figcaption>(.*?)</figcaption>", text)
    assert [caption for _, caption in pairs] == ["0.25", "1.25", "2.25"], "a row that is gone is not shown"
    for (pair, _), image in zip(pairs, images[0], strict=True):
        sample, near = (pixels(uri) for uri in re.findall('src="([^"]*)"', pair))
        np.testing.assert_array_equal(sample, image[..., 0])
        np.testing.assert_array_equal(near, 255 - image[..., 0])
        assert "training image 77, 1" in pair
    assert "1,000 of 50,000 training images" in text and "2.5 in the median" in text
    assert "between 1.5 and 3.5" in text
    assert [description for _, description in re.findall(r'<img class="plot" src="([^"]*)" alt="([^"]*)">', text)] == [
        "FID against Inception score, and both against w",
        "what each rule and guide trades for what, as w grows",
        "loss, images per second and gradient norm against step",
    ]
    assert balanced(text), "every element is closed, in order"

    (folder / "classes" / "0.0.csv").write_text("class,images\nzero,2\n")
    with pytest.raises(ValueError, match=r"classes/0\.0\.csv cannot be used .*: delete it") as caught:
        report(str(folder), str(folder))
    Path(re.findall(r"^(\S*) cannot", str(caught.value))[0]).unlink()
    assert "asked class, w = 3" in Path(report(str(folder), str(folder))).read_text()


def balanced(text: str) -> bool:
    """Whether all elements of a page are closed in the order in which they were opened."""
    void, opened = {"meta", "link", "img", "input", "br"}, []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            if tag not in void:
                opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    Parser().feed(text)
    return not opened


def test_many_pictures_and_classes_stay_below_ten_megabytes(tmp_path: Path) -> None:
    """41 weights, the pairs and fronts.png, all of noise, which PNG cannot compress, and a table of 1,000 classes."""
    config = config_of("imagenet128", tuple(i / 10 for i in range(41)))
    folder = run_folder(tmp_path / "run", config, [f"class {i}" for i in range(1000)], count=4)
    rows, numbers = results.read_rows(str(folder)), np.random.default_rng(0)
    for row in (rows[0], rows[-1]):
        lines = [{"class": c, "images": 50, "class_accuracy": None, "precision": 0.5} for c in range(1000)]
        results.write_classes(str(folder), row["manifest"], lines)
    write_nearest(folder, ["0.0", "4.0"], numbers.integers(0, 256, (2, 10, 128, 128, 3), np.uint8))
    side = int((FRONTS_BYTES / 3) ** 0.5) - 2
    figures.save(str(folder / "fronts.png"), numbers.integers(0, 256, (side, side, 3), np.uint8))
    assert FRONTS_BYTES * 0.98 < (folder / "fronts.png").stat().st_size <= FRONTS_BYTES
    path = Path(report(str(folder), str(folder)))
    text = path.read_text()
    assert len(states_of(text)[0]["images"]) == 2
    assert text.count('class="plot"') == 3 and "<details><summary>1000 classes" in text
    assert len(re.findall("training image 77", text)) >= 10
    assert path.stat().st_size < 10_000_000
    figures.save(str(folder / "fronts.png"), np.concatenate([np.asarray(Image.open(folder / "fronts.png"))] * 2))
    assert "bytes and is not on this page" in Path(report(str(folder), str(folder))).read_text()
