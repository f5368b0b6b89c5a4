"""The reports in a real browser: wide, on a phone, in the dark; by keyboard; without a network."""

import io
import json
import shutil

import pytest
from PIL import Image

from helpers.claims import CLAIM
from helpers.collaborations import TINY, recipe
from helpers.commands import luthier, rows, write
from luthier.claims import claim as claims
from luthier.claims.page import write_claims
from luthier.demos.private import NAMES, demo

pytestmark = pytest.mark.skipif(
    shutil.which("chromedriver") is None, reason="no chromedriver (Debian: chromium-driver)"
)
MODES = {"wide": (1000, "light"), "phone": (390, "light"), "dark": (1000, "dark")}
HOSTILE = "<script>document.title='taken'</script><img src=x onerror=alert(1)> " + "long" * 40


@pytest.fixture(scope="module")
def pages(model_folder, tmp_path_factory):
    """One page of each sort, with hostile text in it."""
    folder = tmp_path_factory.mktemp("pages")
    bad = {"prompt": HOSTILE, "completion": HOSTILE}
    half = {"q-tuning": {"keep_rows": 0.5, "keep_tokens": 0.5}}
    keys = {"max_steps": 2, "curate": [{"q-tuning-offline": {"keep_fraction": 0.5}}], "objective": half}
    for name in ("run", "curate", "compare"):
        (folder / name).mkdir()
    path = write(folder / "run", model_folder, train=[bad, *rows(23)], held=[bad, *rows(5, 100)], **keys)
    made = {"run": luthier("run", path, cwd=folder / "run")}
    path = write(folder / "curate", model_folder, train=[bad, *rows(23)], **keys)
    made["curate"] = luthier("curate", path, "--output-dir", "out", cwd=folder / "curate")
    path = write(folder / "compare", model_folder, train=rows(60), held=[bad, *rows(3, 100)], max_steps=2, output_dir=None,
                 evaluate=[{"exact-match": {"rows": 4, "max_new_tokens": 4}}])  # fmt: skip
    words = ("--vary", "tuner=lora,full", "--seeds", "2", "--no-search", "--processes", "0", "--output-dir", "out")
    made["compare"] = luthier("compare", path, *words, cwd=folder / "compare")
    assert all(done.returncode == 0 for done in made.values()), [done.stderr for done in made.values()]
    (folder / "c.yaml").write_text(CLAIM)
    claim = claims.load(folder / "c.yaml")
    found = {"base": {s: {"m": float(s)} for s in range(3)}, "better": {s: {"m": s + 0.9 + 0.01 * s} for s in range(3)}}
    measured = claim.model_copy(update={"measured": claims.measured(claim, found, 12.0)})
    write_claims(folder / "claims/out/report.html", {"one": measured, "two": claim}, "luthier claim one")
    made = {name: folder / name / "out/report.html" for name in ("run", "curate", "compare", "claims")}
    private = demo(folder / "private", TINY, processes=1)
    sent, back = folder / "private/sent/clinic.html", folder / "private/results/report.html"
    return {
        **made,
        "collaboration": private,
        "audit": sent,
        "translation": back,
        "simulation": simulated(folder / "simulation"),
        "inspect": inspected(folder, folder / "run/out"),
    }


def inspected(folder, run):
    """A run, and its copy under a hostile name."""
    copy = shutil.copytree(run, folder / f"<img src=x onerror=alert(1)> {'long' * 20}")
    done = luthier("inspect", run, copy, "--html", "inspect.html", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "inspect.html"


def simulated(folder):
    """Three clients by name, two rounds."""
    folder.mkdir()
    recipe(folder, collaborate={"one-shot": {"rounds": 2}})
    files = [f"{n}={n}.jsonl" for n in NAMES]
    for words in (("contract", "r.yaml", "c"), ("simulate", "c", *files, "--held", "0.5", "--output", "out")):
        done = luthier("collaborate", *words, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder / "out/report.html"


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for word in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--disable-sync"):  # fmt: skip
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


def opened(browser, page, mode):
    width, scheme = MODES[mode]
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": mode == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get_log("browser")
    browser.get(page.as_uri())


CONTRAST = """
const rgb = s => s.match(/[0-9.]+/g).map(Number);
const light = c => { const [r, g, b] = c.map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b; };
const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
  if (c.length < 4 || c[3] > 0) return c.slice(0, 3); } return [255, 255, 255]; };
let worst = [99, ''];
for (const e of document.querySelectorAll('p, td, th, code, pre, h1, h2, mark, small, summary, figcaption, li, svg.chart text')) {
  if (!e.textContent.trim() || !e.checkVisibility()) continue;
  const style = getComputedStyle(e), ink = e.matches('text') ? style.fill : style.color;
  const a = light(rgb(ink).slice(0, 3)), b = light(behind(e));
  const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  if (ratio < worst[0]) worst = [ratio, e.tagName + ' ' + e.className];
}
return worst;
"""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "name", ["run", "curate", "compare", "claims", "collaboration", "audit", "translation", "simulation", "inspect"]
)
def test_a_page_fits_its_window_reads_well_and_asks_for_nothing(browser, pages, name, mode, tmp_path):
    opened(browser, pages[name], mode)
    width = MODES[mode][0]
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.get_log("browser") == [], "no error, nothing that the content security policy had to stop"
    assert "luthier" in browser.title, "hostile text stays text"
    ratio, where = browser.execute_script(CONTRAST)
    assert ratio >= 4.5, where
    shot = browser.get_screenshot_as_png()
    (tmp_path / f"{name}-{mode}.png").write_bytes(shot)
    picture = Image.open(io.BytesIO(shot)).convert("L")
    assert len(set(picture.getdata())) > 20, "something is drawn"
    corner = picture.getpixel((2, 2))
    assert corner < 60 if mode == "dark" else corner > 200


@pytest.mark.parametrize("name", ["run", "compare", "claims", "collaboration", "translation", "simulation"])
def test_everything_that_scrolls_is_reached_by_keyboard(browser, pages, name):
    from selenium.webdriver.common.keys import Keys

    opened(browser, pages[name], "phone")
    wanted = browser.execute_script(
        "return [...document.querySelectorAll('.scroll, summary')].filter(e => e.checkVisibility()).length"
    )
    seen = set()
    for _ in range(wanted + 30):  # charts wider than the window are stops as well
        browser.switch_to.active_element.send_keys(Keys.TAB)
        seen.add(browser.execute_script(
            "const e = document.activeElement;"
            "return e.matches('.scroll, summary') ? [...document.querySelectorAll('*')].indexOf(e) : -1"
        ))  # fmt: skip
    assert len(seen - {-1}) == wanted > 0


def test_the_comparison_alone_answers_five_questions(browser, pages):
    """Which arm wins and by how much; is that sure; what did it cost; what was forgotten; how to repeat it."""
    opened(browser, pages["compare"], "wide")
    text = browser.execute_script("return document.body.innerText")
    for words in ("Which arm is better, and how sure is that?", "Better than", "95%", "What it cost", "What was forgotten",
                  "Run it again", "luthier compare"):  # fmt: skip
        assert words in text
    told = json.loads((pages["compare"].parent / "standings.json").read_text())
    assert told["arms"][0]["arm"] == told["baseline"]


SIZES = """
return [...document.querySelectorAll('svg.chart')].map(e => [e.getBoundingClientRect().right,
  [...e.querySelectorAll('text')].map(t => t.getScreenCTM().a * parseFloat(getComputedStyle(t).fontSize))]);
"""


@pytest.mark.parametrize("mode", ["wide", "phone"])
@pytest.mark.parametrize("name", ["run", "curate", "compare", "claims", "collaboration", "simulation"])
def test_charts_are_whole_and_their_letters_large_enough(browser, pages, name, mode):
    opened(browser, pages[name], mode)
    charts = browser.execute_script(SIZES)
    assert charts and all(right <= MODES[mode][0] for right, _ in charts)
    sizes = [size for _, letters in charts for size in letters]
    assert 10 <= min(sizes) <= max(sizes) <= 18, "pixels"


@pytest.mark.parametrize("name", ["run", "compare", "claims"])
def test_scores_and_verdicts_are_within_a_phones_window(browser, pages, name):
    opened(browser, pages[name], "phone")
    wide = "return [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).map(e => e.ariaLabel)"
    assert browser.execute_script(wide) == [], "no table goes beyond the window"
    cells = browser.execute_script(
        "return [...document.querySelectorAll('.stack td')].filter(e => e.innerText)"
        ".map(e => [e.dataset.label, e.getBoundingClientRect().right, getComputedStyle(e, '::before').content])"
    )
    assert {"run": "after", "compare": "verdict", "claims": "outcome"}[name] in {label for label, _, _ in cells}
    assert [label for label, right, _ in cells if right > 390] == []
    named = [label for label, _, shown in cells if shown != "none"]
    assert len(named) == len(cells) - {"claims": 2}.get(name, 0), (
        "each value has its column's name before it, but a claim"
    )


def test_pictures_for_the_card(pages):
    folder = pages["run"].parent
    for _ in range(2):  # again: the card names them once
        done = luthier("pictures", folder, "--json", cwd=folder)
        assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert [p.rsplit("/", 1)[1] for p in made] == ["loss.png", "scores.png"]
    card = (folder / "README.md").read_text()
    assert card.count("![loss](loss.png)") == card.count("![scores](scores.png)") == 1
    other = pages["compare"].parent
    names = [p.rsplit("/", 1)[1] for p in json.loads(luthier("pictures", other, "--json", cwd=folder).stdout)]
    assert names == ["differences.png", "costs.png"]
    for file in (folder / "loss.png", folder / "scores.png", other / "differences.png", other / "costs.png"):
        picture = Image.open(file)
        assert picture.width > 800 and len(set(picture.convert("L").getdata())) > 10
    done = luthier("pictures", folder.parent, cwd=folder)
    assert done.returncode == 2 and "is neither a finished run nor a finished comparison" in done.stderr
