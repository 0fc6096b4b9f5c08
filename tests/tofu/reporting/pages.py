"""What every page that we write has to be: checked in a browser, at two widths, in light and in dark."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}

# Runs in the page. Colors and sizes are those that the browser computed, in pixels of the screen.
_PROBLEMS = """
() => {
  const found = [];
  const name = element => `${element.tagName} "${(element.textContent || '').trim().slice(0, 50)}"`;
  const seen = element => element.checkVisibility() && element.getClientRects().length > 0;
  const luminance = color => {
    const parts = color.match(/[\\d.]+/g).slice(0, 3).map(part => part / 255);
    const [r, g, b] = parts.map(part => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const outside = (box, frame, margin) => box.left < frame.left - margin || box.right > frame.right + margin ||
    box.top < frame.top - margin || box.bottom > frame.bottom + margin;
  if (document.documentElement.scrollWidth > innerWidth)
    found.push(`the page is ${document.documentElement.scrollWidth} pixels wide`);

  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = texts.nextNode(); node; node = texts.nextNode()) {
    const element = node.parentElement;
    if (!node.textContent.trim() || element.closest('svg, script') || !seen(element)) continue;
    if (parseFloat(getComputedStyle(element).fontSize) < 11) found.push(`small: ${name(element)}`);
    const range = document.createRange();
    range.selectNodeContents(node);
    const box = range.getBoundingClientRect();
    if (!element.closest('.scroll') && (box.left < -1 || box.right > innerWidth + 1))
      found.push(`cut: ${name(element)}`);
    for (let above = element; above && !above.matches('.scroll'); above = above.parentElement)
      if (getComputedStyle(above).overflowX !== 'visible' && above.scrollWidth > above.clientWidth + 1)
        found.push(`cut: ${name(above)}`);
  }

  for (const svg of document.querySelectorAll('svg')) {
    if (!seen(svg)) continue;
    const label = svg.getAttribute('aria-label').slice(0, 60);
    const frame = svg.getBoundingClientRect();
    const scale = svg.getScreenCTM().a;
    const card = svg.closest('.card');
    const ground = getComputedStyle(card).backgroundColor;
    const data = [...svg.querySelectorAll('.curve, .bar, .mark, .dot, .cell, .seed')];
    if (!data.length) found.push(`no data: ${label}`);
    for (const element of data) {
      const box = element.getBoundingClientRect();
      if (!(box.width > 0 || box.height > 0)) found.push(`empty ${element.className.baseVal}: ${label}`);
      if (outside(box, frame, 8))
        found.push(`${element.className.baseVal} leaves the figure: ${label}`);
    }
    if (/NaN|Infinity|undefined/.test(svg.outerHTML)) found.push(`not a number: ${label}`);
    const boxes = [];
    for (const text of svg.querySelectorAll('text')) {
      const style = getComputedStyle(text);
      const size = parseFloat(style.fontSize) * scale;
      if (size < 11) found.push(`${size.toFixed(1)} px: ${name(text)} in ${label}`);
      const ratio = contrast(style.fill, ground);
      if (ratio < 4.5) found.push(`contrast ${ratio.toFixed(1)}: ${name(text)} in ${label}`);
      const box = text.getBoundingClientRect();
      if (outside(box, frame, 3)) found.push(`cut: ${name(text)} in ${label}`);
      for (const [other, its] of boxes) {
        const wide = Math.min(box.right, its.right) - Math.max(box.left, its.left);
        const tall = Math.min(box.bottom, its.bottom) - Math.max(box.top, its.top);
        if (wide > 2 && tall > 4) found.push(`${name(text)} covers ${name(other)} in ${label}`);
      }
      boxes.push([text, box]);
    }
  }
  return [...new Set(found)];
}
"""


@contextmanager
def opened(browser: Any, address: str) -> Iterator[tuple[Any, list[str]]]:
    """A page in a browser, with its `details` but the long table of settings open, and the list of its errors."""
    context = browser.new_context()
    try:
        page = context.new_page()
        errors: list[str] = []
        page.on("console", lambda message: message.type in ("error", "warning") and errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(f"{error}"))
        page.goto(address)
        page.evaluate("document.querySelectorAll('details:not(:has(#config))').forEach(one => one.open = true)")
        yield page, errors
    finally:
        context.close()


def problems(page: Any) -> list[str]:
    """What is wrong on a page at any width and in either mode: text that is cut, small, pale or covered, figures
    without data, and the violations that axe-core finds.
    """
    from axe_playwright_python.sync_playwright import Axe

    found = []
    for size, (width, height) in SIZES.items():
        page.set_viewport_size({"width": width, "height": height})
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            found += [f"{size}, {scheme}: {problem}" for problem in page.evaluate(_PROBLEMS)]
            if size == "phone":  # every rule of axe-core once, and contrast in the other mode as well
                only = {"runOnly": {"type": "rule", "values": ["color-contrast"]}}
                rules = Axe().run(page, options=only if scheme == "dark" else {})
                for rule in rules.response["violations"]:
                    found.append(f"{size}, {scheme}: {rule['id']}: {rule['nodes'][0]['html'][:200]}")
    return found
