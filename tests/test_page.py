"""The page in a browser, opened from disk: Debian's chromium without a window, driven by playwright."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hostile import SCRIPTS, make_corpus
from made_outputs import write_output
from made_runs import LOSS, NIAH, PASSKEY, make_many, make_run

from harness_ext.publishing import prepare_run
from harness_ext.results.leaderboard import build_site, name_run
from harness_ext.results.paired import compare_runs
from harness_ext.results.publish import Submission
from harness_ext.results.report import Shown, write_report
from harness_ext.results.statistics import holm
from harness_ext.results.store import write_run

playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright, which is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None or sys.platform != "linux", reason="needs Debian's chromium on the path")

Opened = Callable[..., Any]
READY = "body[data-ready]"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Opened]:
    """Opens a file; in the end holds that nothing was asked for but files, and that the page made no error."""
    contexts, wrong = [], []

    def open_file(file: Path, width: int = 1280, height: int = 800, ready: str = READY, **options: Any) -> Any:
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url.partition("#")[0].rpartition("/")[2]))
        page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith("file://") else None)
        page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url}"))
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(file.as_uri())
        page.wait_for_selector(ready)
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven rows: some that reach far, one that ends, one that ran out of memory, one that fails in its own window."""
    results, out = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("site")
    for run in (
        make_run("lab/rope", reach=1.1, tasks=(PASSKEY, NIAH, LOSS), parameters=135_000_000),
        make_run("lab/rope", "yarn", reach=4, tasks=(PASSKEY, LOSS), controls=True),
        make_run("lab/rope", "linear", reach=2.5, unmeasured={8: "out_of_memory"}),
        make_run("lab/table", scheme="learned", stated=True, unmeasured={2: "hard_limit", 4: "hard_limit", 8: "hard_limit"}),
        make_run("lab/biased", scheme="alibi", reach=6, parameters=70_000_000),
        make_run("lab/broken", reach=0.1, parameters=7_000_000_000),
        make_run("lab/unknown", trained=None, parameters=None),
    ):
        write_run(results, run)
    build_site(results, out)
    return out / "index.html"


def names(page: Any) -> list[str]:
    return [text.replace("\n", " ") for text in page.locator("#rows tbody tr.row th .named > div").all_inner_texts()]


def column(page: Any, key: str) -> list[str]:
    place = page.locator("#rows thead th").evaluate_all("(heads, key) => heads.findIndex((head) => head.dataset.key === key)", key)
    return page.locator(f"#rows tbody tr.row > :nth-child({place + 1})").all_inner_texts()


def open_row(page: Any, name: str) -> Any:
    page.get_by_role("button", name=f"Figures of {name}").click()
    opened = page.locator("tr.opened")
    opened.locator(".chart svg").first.wait_for()
    return opened


def test_rows_show_how_far_a_model_reaches_with_its_interval(open_page: Opened, site: Path) -> None:
    page = open_page(site)
    assert page.locator("#count").inner_text() == "7 rows"
    lengths = dict(zip(names(page), column(page, "effective"), strict=True))
    assert re.fullmatch(r"\d[\d,]*\n(none|[\d,]+) to [\d,]+", lengths["lab/biased none"])
    assert lengths["lab/broken none"].startswith("n. m.")
    reaches = dict(zip(names(page), column(page, "reach"), strict=True))
    assert re.fullmatch(r"[\d.]+×\n(none|[\d.]+×) to [\d.]+×", reaches["lab/biased none"])


def test_what_could_not_run_is_named_and_is_not_a_zero(open_page: Opened, site: Path) -> None:
    page = open_page(site)
    scores = dict(zip(names(page), column(page, "at-8"), strict=True))
    assert scores["lab/table none"].split()[0] == "limit"
    assert scores["lab/rope linear ×8"].split()[0] == "memory"
    assert float(scores["lab/broken none"]) == 0.0
    assert scores["lab/unknown none"].split()[0] == "·"
    cell = page.locator("td.unrun", has_text="memory").first
    assert "out of memory" in cell.get_attribute("title")
    assert "gradient" in cell.evaluate("(cell) => getComputedStyle(cell).backgroundImage")


def test_any_column_sorts_both_ways_and_what_has_no_value_stands_last(open_page: Opened, site: Path) -> None:
    page = open_page(site)
    for key in ("model", "effective", "reach", "at-2", "scheme", "method", "size", "trained"):
        head = page.locator(f"#rows thead th[data-key='{key}']")
        shown = []
        for _ in range(2):
            head.get_by_role("button").click()
            shown.append((head.get_attribute("aria-sort"), column(page, key)))
        assert {found for found, _ in shown} == {"ascending", "descending"}
        assert sum(bool(found) for found in page.locator("#rows thead th").evaluate_all("(h) => h.map((e) => e.ariaSort)")) == 1
        if key == "at-2":
            for direction, texts in shown:
                known = [float(text) for text in texts if text[0].isdigit()]
                assert known == sorted(known, reverse=direction == "descending")
                assert all(not text[0].isdigit() for text in texts[len(known) :])


def test_rows_are_filtered_by_scheme_method_and_size_and_searched(open_page: Opened, site: Path) -> None:
    page = open_page(site)
    page.select_option("#scheme", label="learned")
    assert names(page) == ["lab/table none"]
    page.select_option("#scheme", label="any")
    page.select_option("#method", label="yarn")
    assert names(page) == ["lab/rope yarn ×8"]
    page.select_option("#method", label="any")
    page.select_option("#size", label="1 B to 10 B")
    assert names(page) == ["lab/broken none"]
    page.select_option("#size", label="any")
    page.fill("#query", "ROPE lin")
    assert names(page) == ["lab/rope linear ×8"]
    assert page.locator("#count").inner_text() == "1 of 7 rows"
    page.fill("#query", "no such model")
    assert names(page) == []


def test_another_rule_and_another_task_change_the_columns(open_page: Opened, site: Path) -> None:
    page = open_page(site)
    page.select_option("#rule", "k_max")
    page.select_option("#task", label=LOSS)
    page.locator("#rows th[data-key='effective']").wait_for(state="detached")
    assert sorted(names(page)) == ["lab/rope none", "lab/rope yarn ×8"]
    assert all(re.fullmatch(r"\d\.\d{3}", text) for text in column(page, "at-1"))
    page.select_option("#task", label=NIAH)
    playwright.expect(page.locator("#rows tr.row")).to_have_count(1)


def test_a_row_opens_to_its_figures_numbers_controls_records_and_command(open_page: Opened, site: Path) -> None:
    page = open_page(site)
    opened = open_row(page, "lab/rope, yarn ×8")
    opened.locator("figure >> nth=1 >> svg").wait_for()
    assert opened.locator("figcaption > span:first-child").all_inner_texts() == [
        "Score against length, with its controls",
        "Score by depth and length",
        "Score by depth past 1×",
    ]
    assert "needle absent" in opened.locator(".numbers").first.inner_text()
    assert opened.locator(".numbers").nth(1).locator("tbody tr").count() == 7
    records = opened.get_by_role("link", name="Records").first.get_attribute("href")
    assert (site.parent / records).read_text().startswith('{"')
    assert "--model_args pretrained=lab/rope,method=yarn" in opened.locator("code").inner_text()
    opened.get_by_role("button", name="Copy", exact=True).click()
    opened.get_by_role("button", name="Copied").wait_for()
    page.get_by_role("button", name="Figures of lab/rope, yarn ×8").click()
    assert page.locator("tr.opened").count() == 0


def test_a_curve_marks_the_trained_length_what_is_past_it_and_what_could_not_run(open_page: Opened, site: Path) -> None:
    page = open_page(site)
    chart = open_row(page, "lab/table, none").locator(".chart").first
    assert "could not be run" in chart.inner_text()
    paths = chart.locator("svg .mark-rect path, svg .mark-rule line").count()
    assert paths >= 2, "a shade and a line at the trained length"
    assert "lab/table · none" in chart.inner_text()


def test_a_trained_length_that_a_user_states_is_marked(open_page: Opened, site: Path) -> None:
    page = open_page(site)
    assert dict(zip(names(page), column(page, "trained"), strict=True))["lab/table none"] == "256 †"
    facts = open_row(page, "lab/table, none").locator("dl").inner_text()
    assert "the config says 512" in facts
    assert "arXiv 0000.00000, section 3" in facts


def test_picked_runs_are_laid_over_each_other_and_the_address_keeps_them(open_page: Opened, site: Path) -> None:
    page = open_page(site)
    for name in ("lab/rope, none", "lab/rope, yarn ×8", "lab/biased, none"):
        page.get_by_role("checkbox", name=f"Pick {name}").check()
    assert page.locator("#picked").inner_text() == "3 runs picked"
    page.click("#compare")
    page.locator("#overlay figure >> nth=3 >> svg").wait_for()
    legend = page.locator("#overlay .chart").first.inner_text()
    assert all(name in legend for name in ("lab/rope · none", "lab/rope · yarn ×8", "lab/biased · none"))
    assert page.evaluate("document.activeElement.id") == "compared-title"
    assert page.locator("#overlay table").first.locator("tbody tr").count() == 3
    again = open_page(Path(site), ready=READY)
    again.goto(page.url)
    again.reload()
    again.locator("#overlay figure >> nth=3 >> svg").wait_for()
    page.click("#clear")
    assert not page.locator("#compared").is_visible()


def show_pairs(open_page: Opened, folder: Path, *runs: Any) -> Any:
    for run in runs:
        write_run(folder / "results", run)
    build_site(folder / "results", folder / "site")
    page = open_page(folder / "site" / "index.html")
    for box in page.get_by_role("checkbox").all():
        box.check()
    page.click("#compare")
    page.locator("#overlay .reading").first.wait_for()
    return page


def test_picked_runs_are_tested_in_pairs_with_the_numbers_of_compare_runs(open_page: Opened, tmp_path: Path) -> None:
    runs = [
        make_run("lab/rope", reach=1.1, n=100, controls=True),
        make_run("lab/rope", "linear", reach=2.5, n=100, unmeasured={8: "out_of_memory"}),
        make_run("lab/rope", "ntk", reach=3, n=100),
        make_run("lab/rope", "yarn", reach=3.2, n=100, tasks=(PASSKEY, NIAH)),
        make_run("lab/wide", reach=3, n=100, trained=512, multiples=[0.25, 0.5, 1, 2]),
    ]
    page = show_pairs(open_page, tmp_path, *runs)
    shown = {}
    for row in page.locator("#overlay table").last.locator("tbody tr").all():
        first, second = row.locator("th").inner_text().split("\u00a0:\n")
        shown[first, second] = row.locator("td[data-p]").evaluate_all(
            "(cells) => cells.map(({ innerText, dataset: d }) => [innerText.split('\\n')[0], d.p, d.haystacks, d.pHolm, d.haystacksHolm])"
        )
    assert len(shown) == 10
    by_name = {name_run(run.run): run for run in runs}
    tests = {pair: [test for test in compare_runs(*map(by_name.get, pair)) if test.p is not None] for pair in shown}
    family = [test for pair in shown for test in tests[pair]]
    corrected = iter(zip(holm([test.p or 0 for test in family]), holm([test.p_haystacks or 0 for test in family]), strict=True))
    assert max(test.only_first + test.only_second for test in family) > 1074, "2^-n alone would be 0"
    for pair, found in shown.items():
        past = [tuple(cell) for cell in found][:1]
        for test, (counts, *values) in zip(tests[pair], [*found[1:], *past], strict=True):
            assert counts == f"{test.only_first} : {test.only_second}"
            assert [*map(float, values)] == pytest.approx([test.p, test.p_haystacks, *next(corrected)], rel=1e-9, abs=1e-12)
    assert f"the {len(family)} tests of this table" in page.locator("#overlay .reading").first.inner_text()
    page.select_option("#task", label=NIAH)
    playwright.expect(page.locator("#overlay table")).to_have_count(1)


def test_runs_of_other_prompts_are_not_tested_and_words_say_why(open_page: Opened, tmp_path: Path) -> None:
    runs = [make_run("lab/a"), make_run("lab/b"), make_run("lab/other", seed=1), make_run("lab/fewer", n=5)]
    page = show_pairs(open_page, tmp_path, *runs, make_run("lab/short", multiples=[0.25]))
    assert page.locator("#overlay table").last.locator("tbody th").all_inner_texts() == ["lab/a · none\u00a0:\nlab/b · none"]
    other, none = page.locator("#overlay .reading").all_inner_texts()[1:]
    assert other.startswith("Not compared, for they were not given the same prompts")
    assert all(f"{one} · none" in other for one in ("lab/a", "lab/b", "lab/other", "lab/fewer"))
    assert none.startswith("Not compared, for no length was measured on both: ")
    assert none.count("lab/short · none") == 4


def test_a_run_has_one_colour_in_every_figure_and_a_name_that_is_its_alone(open_page: Opened, tmp_path: Path) -> None:
    model = make_run("lab/twin").run.model_info
    ended = make_run("lab/a", unmeasured={2: "hard_limit", 4: "hard_limit", 8: "hard_limit"})
    twins = [
        make_run("lab/twin", seed=seed, model_info=msgspec.structs.replace(model, dtype=dtype)) for seed, dtype in enumerate("xy")
    ]
    page = show_pairs(open_page, tmp_path, ended, *twins)
    page.locator("#overlay figure >> nth=4 >> svg").wait_for()
    names = {"lab/a · none", *(f"lab/twin · none ({run.run.evaluation_id[:8]})" for run in twins)}
    colours = []
    for chart in (page.locator("#overlay .chart").first, page.locator("#overlay .chart").last):
        texts = [text for text in chart.locator(".role-legend-label text").all_text_contents() if text.startswith("lab/")]
        assert set(texts) == names
        marks = chart.locator(".role-legend-symbol path").evaluate_all("(marks) => marks.map((mark) => mark.getAttribute('fill'))")
        colours.append(dict(zip(texts, marks, strict=True)))
    assert colours[0] == colours[1]


def test_depth_profiles_over_other_lengths_are_not_laid_over_each_other(open_page: Opened, tmp_path: Path) -> None:
    page = show_pairs(open_page, tmp_path, make_run("lab/a"), make_run("lab/b", unmeasured={8: "out_of_memory"}))
    page.locator("#overlay figure >> nth=2 >> svg").wait_for()
    captions = page.locator("#overlay figcaption > span:first-child").all_inner_texts()
    assert captions == ["Score against length", "lab/a · none", "lab/b · none"]


def test_everything_is_reached_by_keyboard(open_page: Opened, site: Path) -> None:
    page = open_page(site)
    seen = []
    for _ in range(60):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            "(() => { const e = document.activeElement; return [e.id || e.dataset.run && 'pick' || e.dataset.open && 'open' || e.tagName, "
            "getComputedStyle(e).outlineStyle] })()"
        )
        seen.append(focused[0])
        assert focused[1] != "none", f"focus on {focused[0]} cannot be seen"
        if focused[0] == "pick":
            break
    assert seen[0] == "A", "first the link past the controls"
    assert [name for name in seen if name in ("task", "rule", "query", "scheme", "method", "size")] == [
        "task", "rule", "query", "scheme", "method", "size",
    ]  # fmt: skip
    page.keyboard.press("Space")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("tr.opened .chart svg").first.wait_for()
    assert page.locator("#picked").inner_text() == "1 run picked"


@pytest.mark.parametrize("width", [360, 768])
def test_nothing_is_wider_than_a_telephone(open_page: Opened, site: Path, width: int) -> None:
    page = open_page(site, width=width, height=740, has_touch=True)
    open_row(page, "lab/rope, yarn ×8").locator("figure >> nth=1 >> svg").wait_for()
    page.get_by_role("checkbox", name="Pick lab/rope, none").check()
    page.get_by_role("checkbox", name="Pick lab/rope, yarn ×8").check()
    page.click("#compare")
    page.locator("#overlay figure >> nth=2 >> svg").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = page.evaluate(
        "(width) => [...document.querySelectorAll('body *')].filter((e) => !e.closest('.scroll, .wide, .hidden, .skip') && "
        "e.getBoundingClientRect().right > width + 1).map((e) => e.outerHTML.slice(0, 90))",
        width,
    )
    assert outside == []


CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgb = (color, under) => { canvas.fillStyle = under; canvas.fillRect(0, 0, 1, 1); canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3); };
  const light = (c) => c.map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => { const own = []; for (; e; e = e.parentElement) own.unshift(getComputedStyle(e).backgroundColor);
    return own.reduce((under, color) => `rgb(${rgb(color, under).join()})`, 'white'); };
  const low = [];
  for (const e of document.querySelectorAll('body *')) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || e.closest('svg, .hidden, [hidden], :disabled, noscript')) continue;
    if (e.tagName === 'OPTION' || e.tagName === 'SCRIPT') continue;
    const under = ground(e), [a, b] = [light(rgb(getComputedStyle(e).color, under)), light(rgb(under, 'white'))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push([e.textContent.slice(0, 30), e.className, ratio.toFixed(2)]);
  }
  return low;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(open_page: Opened, site: Path, scheme: str) -> None:
    page = open_page(site, color_scheme=scheme)
    open_row(page, "lab/rope, yarn ×8")
    assert page.evaluate(CONTRAST) == []


def test_the_switch_turns_light_to_dark_with_its_charts_and_is_kept(open_page: Opened, site: Path) -> None:
    page = open_page(site, color_scheme="light")
    open_row(page, "lab/rope, yarn ×8")
    ink = "getComputedStyle(document.body).backgroundColor"
    text = "document.querySelector('tr.opened .chart svg .role-axis-title text').getAttribute('fill')"
    before = (page.evaluate(ink), page.evaluate(text))
    page.click("#theme")
    playwright.expect(page.locator("tr.opened .chart svg .role-axis-title text").first).not_to_have_attribute("fill", before[1])
    assert page.evaluate(ink) != before[0]
    assert page.locator("#theme").get_attribute("aria-pressed") == "true"
    page.reload()
    page.wait_for_selector(READY)
    assert page.evaluate(ink) != before[0]


def test_hostile_records_are_text_on_the_page(open_page: Opened, tmp_path: Path) -> None:
    make_corpus(tmp_path / "results")
    build_site(tmp_path / "results", tmp_path / "site")
    page = open_page(tmp_path / "site" / "index.html", width=360)
    shown = []
    for number, name in enumerate(page.locator("#task option").all_inner_texts()):
        page.select_option("#task", index=number)
        playwright.expect(page.locator("#caption")).to_have_text(f"Models and overrides on {name}")
        toggle = page.locator("button[data-open]").first
        toggle.click()
        page.locator("tr.opened dl").wait_for()
        page.locator("tr.opened .chart").first.locator(".mark-symbol.role-mark path").first.hover(force=True)
        page.locator("#vg-tooltip-element.visible").wait_for()
        shown.append(" ".join(page.locator("#rows").inner_text().split()))
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert [text for text in SCRIPTS if not any(" ".join(text.split()) in row for row in shown)] == []
    page.get_by_role("checkbox").first.check()
    page.click("#compare")
    page.locator("#overlay svg").first.wait_for()
    assert page.evaluate("window.hurt") is None
    assert page.evaluate("document.querySelectorAll('main :is(script, iframe, img, object, embed, link)').length") == 0
    assert page.evaluate(
        "[...document.querySelectorAll('a')].every((a) => /^(records[/][0-9a-f]+[.]jsonl|#rows)$/.test(a.getAttribute('href')))"
    )
    assert page.evaluate(
        "[...document.querySelectorAll('*')].every((e) => [...e.attributes].every((a) => !a.name.startsWith('on')))"
    )


def test_many_models_come_in_pages_and_the_first_view_is_small(open_page: Opened, tmp_path: Path) -> None:
    for run in make_many(120, cells=20, n=2):
        write_run(tmp_path / "results", run)
    build_site(tmp_path / "results", tmp_path / "site")
    page = open_page(tmp_path / "site" / "index.html")
    assert len(names(page)) == 50
    assert page.locator("#place").inner_text() == "1 to 50"
    first = names(page)
    page.click("#on")
    page.click("#on")
    assert page.locator("#place").inner_text() == "101 to 120"
    assert not set(names(page)) & set(first)
    assert page.locator("#on").is_disabled()
    assert sorted(page.asked) == ["index.html", "index.js", "page.css", "page.js", "task-0-nolima.js", "task-0.js"]
    page.locator("button[data-open]").first.click()
    page.locator("tr.opened .chart svg").first.wait_for()
    assert len([name for name in page.asked if name.startswith("run-")]) == 1
    assert {"vega.js", "charts.js"} < set(page.asked)


def test_a_report_is_one_file_that_opens_its_run(open_page: Opened, tmp_path: Path) -> None:
    run = make_run("lab/rope", "yarn", controls=True, tasks=(PASSKEY, LOSS))
    write_report([Shown(published=run, source="out/results.json")], tmp_path)
    alone = tmp_path / "elsewhere" / "report.html"
    alone.parent.mkdir()
    (tmp_path / "report.html").rename(alone)
    page = open_page(alone, ready="tr.opened .chart svg")
    assert "out/results.json" in page.locator("tr.opened").inner_text()
    page.select_option("#task", label=LOSS)
    page.locator("#rows th[data-key='effective']").wait_for(state="detached")


def test_a_report_says_why_a_score_falls(open_page: Opened, tmp_path: Path) -> None:
    def far(length: int, depth: float, sample: int) -> bool:
        return length <= 256 or (length == 512 and sample % 2 == 0)

    left_out = [{"arm": "other_text", "length": None, "outcome": "not_admitted", "reason": "no other text is at hand"}]
    arms = {"stretched": far, "packed": lambda *_: True, "emptied": far, "packed_emptied": lambda *_: True}
    file = write_output(tmp_path / "out", right=far, arms=arms, left_out=left_out, samples=10, long_only_to=512)
    published = prepare_run(file, Submission(evidence="not said"))
    write_report([Shown(published=published, source="out/results.json")], tmp_path)
    page = open_page(tmp_path / "report.html", ready="tr.opened .why")
    why = page.locator(".why").inner_text()
    assert "of the 50 points lost at 2×, 50 [" in why
    assert "4×: long: out_of_memory" in why
    assert "Left out: other_text at 1×, 2×, 4×, not admitted: no other text is at hand" in why
    assert page.locator(".why table", has_text="Predicted, not measured").locator("tbody tr").count() == 1
    assert page.locator(".why table", has_text="The arms").locator("tbody tr").count() == 6
    chart = page.locator("figure", has_text="Why it falls").locator(".chart")
    chart.locator("svg").wait_for()
    assert "long: the plain prompt" in chart.inner_text()
    assert "predicted, not measured" in chart.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_report_of_several_runs_lays_them_over_each_other(open_page: Opened, tmp_path: Path) -> None:
    runs = [make_run("lab/rope", method, reach=reach) for method, reach in (("none", 1.1), ("yarn", 5))]
    hostile = make_corpus(tmp_path / "hostile")[1]
    write_report([*(Shown(published=run, source="</script><script>window.hurt=1</script>") for run in [*runs, hostile])], tmp_path)
    page = open_page(tmp_path / "report.html", ready="#overlay .chart svg")
    assert "lab/rope · yarn ×8" in page.locator("#overlay .chart").first.inner_text()
    assert page.evaluate("window.hurt") is None
