"""A report in a real browser: what it loads, what it says on the console, whether it can be read and used."""

import csv
import importlib.util
import os
import shutil
from pathlib import Path

import pytest
from test_report import HOSTILE, SECTIONS, hostile_sources

import made_up
import uniprune

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright; pip install playwright")

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}

# Contrast as WCAG 2.2 defines it, of every element with text of its own, against what lies behind it.
CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = ([r, g, b]) => {
    const linear = [r, g, b].map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const behind = element => {
    for (let each = element; each; each = each.parentElement) {
      const colour = rgba(getComputedStyle(each).backgroundColor);
      if (colour[3]) return colour;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const text = [...element.childNodes].filter(node => node.nodeType === 3).map(node => node.data).join("").trim();
    if (!text || !element.getClientRects().length || element.closest("script")) continue;
    const style = getComputedStyle(element);
    const colour = rgba(element instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [luminance(colour), luminance(behind(element))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), element.tagName, text.slice(0, 40)]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("the browser tests need chromium: apt-get install chromium, or name one in $CHROMIUM")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    uniprune.report(made_up.everything(folder), folder / "report.html")
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The page of a table of methods."""
    folder = tmp_path_factory.mktemp("table")
    made_up.write(folder / "table" / "comparison.json", made_up.comparison())
    uniprune.report([folder / "table", made_up.write(folder / "bench.json", made_up.speeds())], folder / "report.html")
    return (folder / "report.html").as_uri()


@pytest.fixture
def visit(browser):
    """Opens a page; afterwards nothing may have been fetched but the page, and the console must be empty."""
    contexts, said, asked = [], [], []

    def visit(address, **settings):
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert len([url for url in asked if url.startswith("file:")]) == len(contexts)


def test_the_console_is_heard(browser):
    """The checks below see what they are to see."""
    page, said = browser.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.set_content("<meta http-equiv=Content-Security-Policy content=\"script-src 'none'\"><script>alert(1)</script>")
    assert "Content Security Policy" in said[0]
    page.close()


def test_the_page_is_there(visit, address):
    page = visit(address)
    assert page.title() == "Toy-1M, 51.2% pruned"
    assert page.locator("section").evaluate_all("all => all.map(one => one.id)") == SECTIONS
    for section in SECTIONS[1:]:
        page.get_by_role("navigation").locator(f"a[href='#{section}']").click()
        assert page.locator(f"#{section}").bounding_box()["y"] < 1000
    for plot in page.get_by_role("img").all():
        box = plot.locator("svg").bounding_box()
        assert box["width"] > 300
        assert box["height"] > 100
    assert page.get_by_role("img").count() == 6


def test_tables_sort(visit, address):
    page = visit(address)
    page.locator("#sparsity summary").click()
    table = page.locator("#sparsity details table")
    cells = lambda column: table.locator(f"tbody tr > :nth-child({column})").all_inner_texts()  # noqa: E731
    written = cells(1)
    table.get_by_role("button", name="sparsity").click()
    values = [float(text.rstrip("%")) for text in cells(4)]
    assert values == sorted(values) != sorted(values, reverse=True)
    assert table.locator("th[aria-sort=ascending]").inner_text().startswith("sparsity")
    table.get_by_role("button", name="sparsity").click()
    assert [float(text.rstrip("%")) for text in cells(4)] == values[::-1]
    table.get_by_role("button", name="matrix").press("Enter")  # by keyboard, and letters
    assert cells(1) == sorted(written)
    assert page.locator("[aria-sort]").count() == 1
    sweep = page.locator("#tradeoff table")
    sweep.get_by_role("button", name="packed").click()  # what is unknown comes last
    assert sweep.locator("tbody tr").last.locator("td").nth(2).inner_text() == "\N{EN DASH}"


def test_long_tables_are_filtered(visit, address):
    page = visit(address)
    page.locator("#sparsity summary").click()
    box = page.locator("#sparsity details").get_by_role("searchbox")
    shown = page.locator("#sparsity details tbody tr:visible")
    assert shown.count() == 12
    box.fill("LAYERS.2 mlp")
    assert shown.locator("th").all_inner_texts() == [f"model.layers.2.mlp.{name}_proj" for name in ("up", "down")]
    assert page.locator("#sparsity details").get_by_role("status").inner_text() == "2 of 12 rows"
    box.fill("")
    assert shown.count() == 12
    assert page.locator("#models").get_by_role("searchbox").count() == 0  # a short one needs none


def test_tables_and_plots_are_saved_as_csv(visit, address, tmp_path):
    page = visit(address, accept_downloads=True)

    def saved(link):
        with page.expect_download() as waiting:
            link.click()
        waiting.value.save_as(tmp_path / "saved.csv")
        return waiting.value.suggested_filename, list(csv.reader((tmp_path / "saved.csv").open(newline="")))

    name, rows = saved(page.locator("#tradeoff .table").get_by_role("button", name="Download as CSV"))
    assert name == "toy-1m-toy-txt-4-samples-of-64-tokens.csv"
    assert rows[0] == ["pattern", "sparsity", "perplexity", "packed", "best for its size"]
    assert rows[1] == ["dense", "0.0", "12.5", "4900000.0", ""]
    name, rows = saved(page.locator("#sparsity figure a"))
    assert name == "sparsity-0.csv"
    assert rows[:2] == [["block", "matrix", "sparsity"], ["0", "self_attn.q_proj", "0.2"]]
    assert len(rows) == 1 + 12
    page.locator("#sparsity summary").click()
    page.locator("#sparsity details").get_by_role("searchbox").fill("layers.1")
    assert (
        len(saved(page.locator("#sparsity details").get_by_role("button", name="Download as CSV"))[1]) == 1 + 4
    )  # what is shown


def test_no_text_is_a_formula_in_a_spreadsheet(visit, tmp_path):
    path = made_up.write(tmp_path / "e.json", made_up.evaluation("=1+2", tasks={"@a,b": made_up.tasks()["rte"]}))
    uniprune.report([path, made_up.write(tmp_path / "dense.json", made_up.dense())], tmp_path / "report.html")
    page = visit((tmp_path / "report.html").as_uri(), accept_downloads=True)
    for link in (page.locator("#zero-shot figure a"), page.locator("#models").get_by_role("button", name="Download as CSV")):
        with page.expect_download() as waiting:
            link.click()
        waiting.value.save_as(tmp_path / "saved.csv")
        cells = [cell for row in csv.reader((tmp_path / "saved.csv").open(newline="")) for cell in row]
        assert "'=1+2" in cells
        assert not any(cell.startswith(("=", "@")) for cell in cells)


AXE = importlib.util.find_spec("axe_playwright_python")


@pytest.mark.skipif(AXE is None, reason="axe-core is needed; pip install axe-playwright-python")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200, 1920])
@pytest.mark.parametrize("which", ["address", "table"])
def test_axe_finds_nothing(visit, request, which, width, scheme):
    page = visit(request.getfixturevalue(which), viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    page.evaluate((Path(AXE.origin).parent / "axe.min.js").read_text())
    found = page.evaluate("axe.run()")
    assert [(one["id"], one["nodes"][0]["html"]) for one in found["violations"]] == []
    assert len(found["passes"]) > 15


def test_a_table_of_methods_begins_with_the_verdict_and_the_table(visit, table):
    page = visit(table, viewport={"width": 1200, "height": 900})
    assert page.locator(".verdict").inner_text().startswith("Toy-1M pruned by 4 methods")
    heads = page.locator("#comparison tbody th").all_inner_texts()
    assert heads == ["dense", "wanda", "feedback", "ria:a=0.5", "sparsegpt (updates weights)"]
    box = page.locator("#comparison table").bounding_box()
    assert box["y"] + box["height"] < 900
    assert page.locator("#comparison .best").all_inner_texts() == ["30.00", "60.00"]
    page.get_by_role("button", name="perplexity").first.click()
    assert page.locator("#comparison tbody th").all_inner_texts()[0] == "dense"
    assert page.evaluate("document.documentElement.scrollWidth") == 1200


def test_a_printed_page_has_everything_and_no_controls(visit, table):
    page = visit(table)
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    assert page.locator(".tools:visible, nav:visible, figcaption:visible").count() == 0
    assert page.locator(".long").evaluate_all("all => all.every(one => one.scrollHeight <= one.clientHeight + 1)")


def test_it_can_be_read_without_script(visit, address):
    page = visit(address, java_script_enabled=False)
    page.locator("#sparsity summary").click()
    assert page.get_by_text("model.layers.2.mlp.down_proj").is_visible()
    assert page.get_by_role("button").count() == 0


def test_a_phone_needs_no_sideways_scrolling(visit, address):
    page = visit(address, **PHONE)
    for opened in (False, True):
        if opened:
            page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    wide = page.locator(".wide").evaluate_all("all => all.filter(one => one.scrollWidth > one.clientWidth).length")
    assert wide > 0  # tables that do scroll, in boxes of their own


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(visit, address, scheme):
    page = visit(address, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    contrasts = page.evaluate(CONTRASTS)
    assert {"TD", "H1", "MARK", "DD", "A", "text"} <= {tag for _, tag, _ in contrasts}
    assert min(contrasts)[0] >= 4.5, min(contrasts)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")


def test_hostile_strings_are_inert(visit, tmp_path):
    uniprune.report(hostile_sources(tmp_path), tmp_path / "report.html")
    page = visit((tmp_path / "report.html").as_uri(), **PHONE)
    assert page.locator("script").count() == 1
    assert page.locator("img").count() == 0
    assert page.locator("section").count() == len(SECTIONS)
    assert "<script>alert(1)</script>" in page.locator("#generations").inner_text()
    assert HOSTILE[:20] in page.title()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
