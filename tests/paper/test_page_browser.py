"""The credit page in a real browser: it opens, chooses and filters, and hostile text from a world stays text.

The tests are skipped, with the command to install them, where the browser or its driver is missing.
"""

import json
import math
import shutil
from dataclasses import dataclass

import pytest
from test_page import files_of_a_run, write_run

from paper import page

INSTALL = "apt-get install -y chromium chromium-driver && pip install -r requirements-browser.txt"


@dataclass
class Page:
    """The page in a browser, and the records that it was made from by the name of their batch."""

    driver: object
    address: str
    records: dict[str, list[dict]]

    def open(self, choice: str = "", width: int = 1200) -> None:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get("about:blank")  # the same address with another # would not load the page again
        self.driver.get(self.address + choice)

    def run(self, script: str):
        self.driver.execute_async_script("setTimeout(arguments[0])")  # the page handles a new choice first
        return self.driver.execute_script(script)

    def choose(self, name: str, place: int) -> None:
        from selenium.webdriver.common.by import By
        from selenium.webdriver.support.ui import Select

        Select(self.driver.find_element(By.ID, name)).select_by_index(place)


@pytest.fixture(scope="module")
def shown(house_episodes, house_policy, tmp_path_factory):
    """The page of a run with both iterations, in a headless Chromium."""
    pytest.importorskip("selenium", reason=INSTALL)
    if not (chromium := shutil.which("chromium")) or not (driver := shutil.which("chromedriver")):
        pytest.skip(INSTALL)
    from selenium import webdriver

    files = files_of_a_run(house_episodes, house_policy.tokenizer.decode)
    run = write_run(tmp_path_factory.mktemp("run"), files)
    page.main([str(run)])
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    names = {"2-episodes": "episodes/000002", "10-credit": "credit/000010", "10-episodes": "episodes/000010"}
    by_name = {name: files[f"{file}.jsonl"] for name, file in names.items()}
    yield Page(browser, (run / "credit.html").as_uri(), by_name)
    browser.quit()


def number(value: float, sign: bool = False) -> str:
    """A number as the page writes it."""
    written = f"{value:+.3f}" if sign else f"{value:.3f}"
    return written.replace("-", "\N{MINUS SIGN}") if float(written) else "0.000"


def filtered(records: list[dict]) -> dict[str, list[str]]:
    """By loops: the steps of the two filters, as GROUP/EPISODE/STEP. A fifth by linear interpolation."""
    values = sorted(h for record in records for h in record["modulation"]["norm_entropy"])

    def quantile(share: float) -> float:
        place = share * (len(values) - 1)
        low, high = values[math.floor(place)], values[math.ceil(place)]
        return low + (place - math.floor(place)) * (high - low)

    found = {"mistake": [], "uncertain": []}
    for row, record in enumerate(records):
        for step, h in enumerate(record["modulation"]["norm_entropy"]):
            where = f"{row // 3}/{row % 3}/{step}"
            if not record["info"]["success"] and h <= quantile(0.2):
                found["mistake"].append(where)
            if record["info"]["success"] and h >= quantile(0.8):
                found["uncertain"].append(where)
    return found


READ = """
const texts = (node, selector) => [...node.querySelectorAll(selector)].map((found) => found.textContent);
return JSON.stringify({
  prompt: texts(document, ".task")[0],
  task: texts(document, "#overview h2")[0],
  chosen: texts(document, "#steps h2")[0],
  note: texts(document, "#overview .note"),
  error: texts(document, "#steps .note"),
  rows: [...document.querySelectorAll("tbody tr")].map((row) => ({
    outcome: texts(row, "th span")[0],
    cells: [...row.querySelectorAll(".cell")].map((cell) => texts(cell, "span:not(.marks)"))})),
  steps: [...document.querySelectorAll(".step")].map((card) => ({
    words: [".thought", ".action", ".observation"].map((part) => texts(card, part)[0]),
    numbers: Object.fromEntries([...card.querySelectorAll(".numbers dd")].map((dd) => [dd.className, dd.textContent])),
    tags: texts(card, ".tag"), tokens: texts(card, ".token"),
    about: [...card.querySelectorAll(".token")].map((token) => token.about)})),
})"""  # as JSON, because the driver cannot send a lone surrogate


def expected_steps(records: list[dict], row: int) -> list[dict]:
    """The steps of an episode as READ finds them."""
    steps, record, marks = [], records[row], filtered(records)
    tokens, modulation = iter(record["tokens"]), record["modulation"]
    for place, step in enumerate(record["steps"]):
        where, positions = f"{row // 3}/{row % 3}/{place}", range(step["start"], step["end"])
        numbers = {name: number(modulation[name][place]) for name in ("entropy", "norm_entropy", "g", "f")}
        numbers |= {"entropy": f"{numbers['entropy']} nats", "base": number(modulation["base"], sign=True)}
        numbers["advantage"] = number(modulation["advantage"][place], sign=True)
        if credit := record.get("credit"):
            before, after = map(number, credit["value"][place : place + 2])
            numbers["true_advantage"] = number(credit["true_advantage"][place], sign=True)
            numbers["soft values"] = f"V {before} → {after}, 16 continuations each"
        invalid = [] if step["valid"] else ["\N{MULTIPLICATION SIGN} invalid action"]
        mistake = ["! confident mistake"] if where in marks["mistake"] else []
        uncertain = ["? uncertain success"] if where in marks["uncertain"] else []
        about = [(number(record["token_entropy"][p]), number(record["old_logp"][p])) for p in positions]
        steps.append(
            {
                "words": [step["thought"], step["action"], step["observation"]],
                "numbers": numbers,
                "tags": [*invalid, *mistake, *uncertain],
                "tokens": [next(tokens) for _ in positions],
                "about": [f"entropy {entropy} nats, log-prob {logp}" for entropy, logp in about],
            }
        )
    assert next(tokens, None) is None
    return steps


def expected_rows(group: list[dict]) -> list[dict]:
    """The group's episodes side by side as READ finds them."""
    rows = []
    for record in group:
        values = [record["modulation"]["advantage"]]
        values += [record["credit"]["true_advantage"]] if "credit" in record else []
        cells = [[number(value, sign=True) for value in step] for step in zip(*values, strict=True)]
        rows.append({"outcome": "✓ success" if record["reward"] else "✗ truncated", "cells": cells})
    return rows


def test_every_choice_shows_what_the_file_holds(shown):
    """All batches, groups and episodes through the selectors. True credit is shown only where it was measured."""
    shown.open()
    for place, records in enumerate(shown.records.values()):
        shown.choose("batch", place)
        for row, record in enumerate(records):
            shown.choose("group", row // 3)
            shown.choose("episode", row % 3)
            found, group = json.loads(shown.run(READ)), records[row // 3 * 3 :][:3]
            assert found["chosen"].startswith(f"Episode {row % 3} of group {row // 3}: ")
            assert found["steps"] == expected_steps(records, row)
            assert found["rows"] == expected_rows(group)
            assert found["prompt"] == group[0]["prompt"]
            assert found["task"] == "Group {}: {env} {split} {seed}".format(row // 3, **group[0]["task"])
            equal = "All rewards are equal: the base advantage is 0, only the bonus remains."
            assert found["note"] == ([] if any(other["reward"] for other in group) else [equal])
            error = record["info"].get("error")
            assert found["error"] == ([f"Broken off by an error: {error}"] if error else [])


def test_the_filters_list_the_steps_that_loops_find_and_lead_to_them(shown):
    cases = [
        (name, kind, steps) for name, records in shown.records.items() for kind, steps in filtered(records).items()
    ]
    assert {kind for _, kind, steps in cases if steps} == {"mistake", "uncertain"}
    for name, kind, steps in cases:
        shown.open(f"#{name}")
        links = f"[...document.querySelectorAll('#{kind} a')]"
        assert shown.run(f"return {links}.map((a) => a.getAttribute('href'))") == [f"#{name}/{s}" for s in steps]
        assert shown.run(f"return document.querySelector('#{kind} summary').textContent").endswith(f": {len(steps)}")
        for where in steps[-1:]:
            shown.run(f"document.getElementById('{kind}').open = true; {links}.at(-1).click()")
            chosen = [shown.run(f"return document.getElementById('{s}').selectedIndex") for s in ("group", "episode")]
            current = "return [...document.querySelectorAll('.step')].findIndex((s) => s === document.activeElement)"
            assert [*chosen, shown.run(current)] == [int(number) for number in where.split("/")]
            top = shown.run("return document.querySelector('.step[aria-current]').getBoundingClientRect().top")
            assert 0 <= top < 900


def test_an_address_is_a_choice_and_back_returns_to_the_one_before(shown):
    read = "return ['batch', 'group', 'episode'].map((id) => document.getElementById(id).selectedIndex)"
    for address, chosen in [
        ("", [0, 0, 0]),
        ("#10-credit", [1, 1, 0]),  # the first group in which some succeed and some do not
        ("#10-episodes/1/2/0", [2, 1, 2]),
        ("#2-episodes/99/-5/x", [0, 1, 0]),
        ("#%3Cscript%3E/constructor", [0, 0, 0]),
    ]:
        shown.open(address)
        assert shown.run(read) == chosen
    shown.choose("episode", 2)
    shown.driver.back()
    assert shown.run(read) == [0, 0, 0]


def test_hostile_texts_stay_text_and_no_script_but_the_page_s_own_runs(shown):
    shown.open("#10-episodes/0/0")
    title = shown.run("return document.title")
    for filter_ in ("mistake", "uncertain"):
        shown.run(f"document.getElementById('{filter_}').open = true")
    assert shown.run("return [typeof window.hacked, document.title, frames.length]") == ["undefined", title, 0]
    assert title.startswith("Credit page: ")
    assert shown.run("return document.querySelectorAll('script, img, svg, textarea').length") == 2
    shown.run(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked = 1'}))"
    )
    shown.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked = 1\">')")
    shown.driver.execute_async_script("setTimeout(arguments[0], 100)")
    assert shown.run("return typeof window.hacked") == "undefined"  # refused by the Content-Security-Policy
    assert shown.driver.get_log("browser")  # which says so


@pytest.mark.parametrize("width", [380, 1200])
def test_it_opens_without_errors_or_requests_and_fits_the_width(shown, width):
    shown.driver.get_log("browser")  # forget what other tests provoked
    for name in shown.records:
        shown.open(f"#{name}", width)
        shown.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        for group in range(2):
            shown.choose("group", group)
            assert shown.run("return document.documentElement.scrollWidth") <= width
        assert shown.run("return performance.getEntriesByType('resource').length") == 0
    assert shown.driver.get_log("browser") == []


def test_a_step_is_chosen_with_the_keyboard_alone(shown):
    from selenium.webdriver.common.keys import Keys

    shown.open("#2-episodes/0/1")
    shown.run("document.querySelectorAll('tbody tr')[2].querySelector('a').focus()")
    for key in (Keys.TAB, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.ENTER):
        shown.driver.switch_to.active_element.send_keys(key)
    assert shown.run("return location.hash") == "#2-episodes/0/2/1"


def test_pointer_and_arrow_keys_read_the_entropy_of_a_token(shown):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    shown.open("#2-episodes/0/1")
    first, second, *_ = expected_steps(shown.records["2-episodes"], 1)[0]["about"]
    tip = shown.driver.find_element(By.ID, "tip")
    tokens = shown.driver.find_elements(By.CSS_SELECTOR, ".token")
    ActionChains(shown.driver).move_to_element(tokens[1]).perform()
    assert tip.text.endswith(f": {second}")
    ActionChains(shown.driver).move_to_element(shown.driver.find_element(By.TAG_NAME, "h1")).perform()
    assert not tip.is_displayed()
    shown.run("document.querySelector('.token').focus()")
    assert tip.text.endswith(f": {first}")
    shown.driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert tip.text.endswith(f": {second}")
