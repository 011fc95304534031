"""The page in a browser: the heat map drawn, clicked through and steered by the keyboard. Skipped without a Chromium."""

from __future__ import annotations

import pytest
import report_browser

BROWSER = report_browser.find()
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no Chromium installed (looked for {', '.join(report_browser.NAMES)})")

HELPERS = """
const $ = (id) => document.getElementById('heat-' + id);
const tokens = () => [...document.querySelectorAll('#heat-panels .token')];
const pick = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event('change')); };
const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true, cancelable: true }));
const here = () => tokens().findIndex((t) => t === document.activeElement);
const named = (id, start) => [...$(id).options].findIndex((o) => o.textContent.startsWith(start));
"""


@pytest.fixture
def ask(report, tmp_path):
    def run(script: str) -> dict:
        told = report_browser.run(BROWSER, report.html, HELPERS + script, tmp_path)
        assert not isinstance(told, dict) or "error" not in told, told
        return told

    return run


def test_the_map_opens_on_a_selecting_method_with_kept_tokens_framed(ask):
    told = ask("""return { block: $('block').selectedOptions[0].textContent, quantity: $('quantity').selectedOptions[0].textContent,
      tokens: tokens().length, kept: tokens().filter((t) => t.classList.contains('kept')).length,
      frame: getComputedStyle(document.querySelector('.token.kept')).boxShadow, plain: getComputedStyle(document.querySelector('.token:not(.kept)')).boxShadow,
      colours: new Set(tokens().map((t) => t.style.background)).size, tabbable: tokens().filter((t) => t.tabIndex === 0).length,
      detail: document.getElementById('heat-details').textContent };""")
    assert told["block"].startswith("Training rollouts · Teachability") and told["quantity"].startswith("Dlearn")
    assert told["tokens"] > 3 and 0 < told["kept"] < told["tokens"] and told["colours"] > 2
    assert told["frame"] != "none" and told["plain"] == "none"
    assert told["tabbable"] == 1 and "Top 5, student" in told["detail"] and "Top 5, teacher" in told["detail"]


def test_every_block_quantity_and_response_can_be_shown(ask):
    told = ask("""const seen = [];
      for (let b = 0; b < $('block').options.length; b++) { pick('block', b);
        for (let q = 0; q < $('quantity').options.length; q++) { pick('quantity', q);
          for (const r of [0, $('response').options.length - 1]) { pick('response', r);
            seen.push([tokens().length, $('low').textContent, $('high').textContent, tokens().some((t) => !t.style.color)]); } } }
      return seen;""")
    assert len(told) == 2 * (3 * 5 + 3 * 8)
    assert all(count > 0 and low and high and not uncoloured for count, low, high, uncoloured in told)


def test_keyboard_moves_token_response_and_colour(ask):
    told = ask("""tokens()[0].click(); const out = { start: here() };
      press('ArrowRight'); press('ArrowRight'); out.right = here();
      press('ArrowLeft'); out.left = here();
      press('End'); out.end = here(); out.last = tokens().length - 1;
      press('Home'); out.home = here();
      press('k'); out.kept = document.activeElement.classList.contains('kept');
      const first = here(); press('k'); out.next = here() !== first || tokens().filter((t) => t.classList.contains('kept')).length === 1;
      press('ArrowDown'); out.response = +$('response').value; out.focus = here();
      press('ArrowUp'); press('ArrowUp'); out.wrapped = +$('response').value === $('response').options.length - 1;
      press('c'); out.quantity = +$('quantity').value; out.stays = here() >= 0;
      return out;""")
    assert (told["start"], told["right"], told["left"], told["home"]) == (0, 2, 1, 0)
    assert told["end"] == told["last"] and told["kept"] and told["next"]
    assert told["response"] == 1 and told["focus"] == 0 and told["wrapped"] and told["quantity"] == 1 and told["stays"]


def test_pointing_at_a_token_shows_its_numbers_and_both_lists(ask):
    told = ask("""const t = tokens()[3]; t.dispatchEvent(new MouseEvent('mouseover', { bubbles: true }));
      const box = document.getElementById('heat-details');
      return { what: box.querySelector('.what').textContent, selected: tokens().findIndex((x) => x.getAttribute('aria-selected') === 'true'),
        rows: [...box.querySelectorAll('table tr')].map((r) => r.textContent), bars: box.querySelectorAll('.top i').length,
        label: t.getAttribute('aria-label'), text: t.textContent };""")
    assert "token 4 of" in told["what"] and told["selected"] == 3 and told["bars"] == 10
    assert any(row.startswith("Dlearn, teachability") for row in told["rows"]) and any(row.startswith("C, probability") for row in told["rows"])
    assert "position 4 of" in told["label"]


def test_frozen_contexts_show_before_and_after_side_by_side(ask):
    told = ask("""pick('block', named('block', 'Frozen contexts · Full'));
      const panels = [...document.querySelectorAll('#heat-panels .panel')];
      panels[1].querySelectorAll('.token')[2].click();
      const out = { titles: panels.map((p) => p.querySelector('h4').textContent), sizes: panels.map((p) => p.querySelectorAll('.token').length),
        lists: [...document.querySelectorAll('.top h5')].map((h) => h.textContent), both: document.querySelectorAll('.token.twin').length,
        ring: $('ring').hidden, prompt: $('prompt').textContent, inSecond: panels[1].contains(document.activeElement) };
      pick('quantity', named('quantity', 'gain')); out.one = document.querySelectorAll('#heat-panels .panel').length; out.low = $('low').textContent;
      return out;""")
    assert told["titles"] == ["before training", "after training"] and told["sizes"][0] == told["sizes"][1] > 3
    assert told["lists"] == ["Top 5, student before", "Top 5, teacher", "Top 5, student after"]
    assert told["both"] == 2 and told["ring"] and "prompt Q0+1?" in told["prompt"] and told["inSecond"]
    assert told["one"] == 1 and told["low"].startswith("-")


def test_text_on_every_colour_can_be_read(ask):
    told = ask("""const light = (c) => { const l = c.match(/\\d+/g).slice(0, 3).map((x) => { x /= 255; return x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4; });
        return 0.2126 * l[0] + 0.7152 * l[1] + 0.0722 * l[2]; };
      let worst = 99;
      for (const palette of ['cividis', 'viridis']) { pick('palette', palette);
        for (let b = 0; b < $('block').options.length; b++) { pick('block', b);
          for (let q = 0; q < $('quantity').options.length; q++) { pick('quantity', q);
            for (const t of tokens()) { const s = getComputedStyle(t), a = light(s.color), c = light(s.backgroundColor);
              worst = Math.min(worst, (Math.max(a, c) + 0.05) / (Math.min(a, c) + 0.05)); } } } }
      return { worst };""")
    assert told["worst"] >= 4.5


def test_no_request_leaves_the_page_and_the_layout_does_not_overflow(ask):
    told = ask("""return { loaded: performance.getEntriesByType('resource').map((e) => e.name), wide: document.documentElement.scrollWidth <= window.innerWidth };""")
    assert told["loaded"] == [] and told["wide"]
