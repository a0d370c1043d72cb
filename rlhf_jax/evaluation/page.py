"""The HTML of a report: style sheet, one static script, and helpers that escape whatever they are given.

The page fetches nothing, and its security policy forbids it to: the only script that may run is SCRIPT, named
by its hash, so that text of a model is inert even if an escape were forgotten. Knows nothing of runs and
numbers' meaning."""

import base64
import hashlib
import html
import re

MAX_CHARACTERS = 1500  # of one text of a model on the page
# Control characters (tab and newline excepted) and marks that reorder the text around them.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)

SCRIPT = """
document.querySelectorAll("table.sortable th.number").forEach(function (head) {
  head.addEventListener("click", function () {
    var table = head.closest("table"), body = table.tBodies[0], i = head.cellIndex;
    var down = head.getAttribute("aria-sort") !== "descending";
    table.querySelectorAll("th").forEach(function (other) { other.removeAttribute("aria-sort"); });
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    var number = function (row) { return parseFloat(row.cells[i].dataset.value); };
    var key = function (row) { return isNaN(number(row)) ? -Infinity : number(row); };
    Array.from(body.rows).sort(function (a, b) { return (down ? 1 : -1) * (key(b) - key(a)); })
      .forEach(function (row) { body.appendChild(row); });
  });
});
"""

STYLE = """
:root { color-scheme: light;
  --page: #f6f7fa; --card: #ffffff; --text: #1b2330; --muted: #5f6b7e; --grid: #e2e6ed;
  --before: #8490a3; --after: #0b8f6f; --reward: #2f62d9; --gold: #a86c05; --kl: #7d45d6; --other: #46566f;
  --limit: #c9343f; --ok: #17805f; --warn: #96610a; --bad: #b92c38; --ok-fill: #e3f4ee;
  --warn-fill: #fbf0d9; --bad-fill: #fbe5e6; --before-fill: #f1f3f6; --after-fill: #e9f6f2; }
@media (prefers-color-scheme: dark) { :root { color-scheme: dark;
  --page: #12151b; --card: #1a1f28; --text: #e4e8ef; --muted: #98a3b5; --grid: #2c3442;
  --before: #8d98ab; --after: #3fcaa2; --reward: #7ba3ff; --gold: #e8b04a; --kl: #b593ff; --other: #a9b6cc;
  --limit: #ff7a82; --ok: #52d3aa; --warn: #eebb5c; --bad: #ff8b92; --ok-fill: #16352d;
  --warn-fill: #382d14; --bad-fill: #3d1d21; --before-fill: #202631; --after-fill: #173029; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0; background: var(--page); color: var(--text); line-height: 1.55;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; font-size: 16px; }
main { max-width: 1180px; margin: 0 auto; padding: 2.2rem 1.4rem 4rem; }
h1 { font-size: 1.05rem; font-weight: 600; color: var(--muted); margin: 0 0 .5rem; }
h2 { font-size: 1.3rem; margin: 0 0 .3rem; line-height: 1.3; }
h3 { font-size: 1.02rem; margin: 1.6rem 0 .4rem; }
p { margin: .3rem 0 .8rem; max-width: 78ch; }
section, .verdict { background: var(--card); border: 1px solid var(--grid); border-radius: 12px;
  padding: 1.4rem 1.6rem 1.5rem; margin: 1.1rem 0; }
.verdict { border-left: 6px solid var(--muted); }
.verdict.ok { border-left-color: var(--ok); } .verdict.warn { border-left-color: var(--warn); }
.verdict.bad { border-left-color: var(--bad); }
.verdict .headline { font-size: 1.75rem; font-weight: 700; line-height: 1.25; margin: 0 0 .5rem; }
.verdict.ok .headline { color: var(--ok); } .verdict.warn .headline { color: var(--warn); }
.verdict.bad .headline { color: var(--bad); }
.verdict .summary { font-size: 1.12rem; margin-bottom: .4rem; }
.muted, figcaption, .lead { color: var(--muted); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(175px, 1fr)); gap: .8rem;
  margin-top: 1.1rem; }
.card { border: 1px solid var(--grid); border-radius: 10px; padding: .75rem .95rem; }
.card .name { font-size: .84rem; color: var(--muted); }
.card .value { font-size: 1.35rem; font-weight: 650; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.card .value .old { color: var(--muted); font-weight: 450; }
.card .note { font-size: .8rem; color: var(--muted); }
nav { display: flex; flex-wrap: wrap; gap: .35rem 1.1rem; font-size: .92rem; padding: 0 .2rem; }
a { color: var(--reward); text-decoration: none; } a:hover { text-decoration: underline; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(290px, 1fr)); gap: 1.3rem 1.6rem;
  margin-top: 1rem; }
figure { margin: 0; }
figure.wide { display: grid; grid-template-columns: minmax(300px, 13fr) minmax(200px, 6fr);
  gap: .2rem 1.6rem; align-items: center; margin-top: 1rem; }
figure.wide .title { grid-column: 1 / -1; }
figure .title { font-weight: 600; font-size: .97rem; margin-bottom: .25rem; }
figcaption { font-size: .86rem; line-height: 1.45; margin-top: .3rem; max-width: 78ch; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .5rem .7rem; border-bottom: 1px solid var(--grid); }
th { font-weight: 600; color: var(--muted); font-size: .84rem; vertical-align: bottom; }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
table.sortable th.number { cursor: pointer; } table.sortable th.number:hover { color: var(--text); }
th[aria-sort=descending]::after { content: " \\2193"; } th[aria-sort=ascending]::after { content: " \\2191"; }
table.samples { table-layout: fixed; min-width: 800px; }
table.samples td.text { width: auto; } table.samples th.number { width: 5.4rem; white-space: normal; }
table.samples th.prompt { width: 24%; }
td.before { background: var(--before-fill); } td.after { background: var(--after-fill); }
.words { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.chips { margin-top: .35rem; font-size: .8rem; color: var(--muted); font-variant-numeric: tabular-nums; }
.up { color: var(--ok); } .down { color: var(--bad); }
.sign { display: grid; grid-template-columns: 4.6rem minmax(11rem, 17rem) 1fr; gap: .2rem 1rem;
  padding: .55rem 0; border-bottom: 1px solid var(--grid); align-items: baseline; }
.sign:last-child { border-bottom: 0; }
.sign b { font-weight: 600; }
.badge { font-size: .78rem; font-weight: 650; border-radius: 999px; padding: .12rem .65rem;
  text-align: center; }
.sign .badge { min-width: 4rem; justify-self: start; }
.badge.ok { color: var(--ok); background: var(--ok-fill); }
.badge.warn { color: var(--warn); background: var(--warn-fill); }
.badge.bad { color: var(--bad); background: var(--bad-fill); }
.time { display: grid; grid-template-columns: minmax(8rem, 15rem) 1fr 5.5rem; gap: .3rem 1rem;
  align-items: center; font-size: .92rem; }
.time .bar { background: var(--grid); border-radius: 5px; height: .8rem; overflow: hidden; }
.time .bar i { display: block; height: 100%; background: var(--reward); }
.time .seconds { text-align: right; font-variant-numeric: tabular-nums; }
details { margin: .5rem 0; } summary { cursor: pointer; font-weight: 600; padding: .25rem 0; }
pre { background: var(--before-fill); border-radius: 8px; padding: .9rem 1rem; overflow-x: auto;
  font-size: .82rem; line-height: 1.45; }
@media (max-width: 640px) {
  main { padding: 1rem .6rem 3rem; } section, .verdict { padding: 1rem; }
  figure.wide { display: block; } .sign { grid-template-columns: 1fr; }
  .verdict .headline { font-size: 1.4rem; } }
@media print { body { background: none; } section, .verdict { break-inside: avoid; } }
"""


def escape(text, limit=None):
    """Text as HTML, also inside a quoted attribute; unprintable characters become U+FFFD."""
    text = str(text)
    cut = f"… (+{len(text) - limit} characters)" if limit and len(text) > limit else ""
    return html.escape(UNPRINTABLE.sub("\ufffd", text[:limit] + cut), quote=True)


def words(text):
    """A model's or a user's text: line breaks kept, direction its own, length bounded."""
    return f'<div class="words" dir="auto">{escape(text, MAX_CHARACTERS)}</div>'


def number(value, signed=False):
    """Two decimals or two digits, whichever says more; a dash where there is no number."""
    if value is None or value != value:  # NaN
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return escape(value)
    if isinstance(value, int):
        return f"{value:,}"
    size, sign = abs(value), "+" if signed and value else ""
    form = ",.0f" if size >= 100 else ".1f" if size >= 10 else ".2f" if size >= 0.095 else ".2g"
    return format(value, sign + form).replace(
        "-", "\u2212", 1 if value < 0 else 0
    )  # a minus as wide as a plus


def number_cell(value, signed=False):
    """A table cell that sorts by its value."""
    if value is None or value != value:  # NaN
        return '<td class="number" data-value="">–</td>'
    colour = (" up" if value > 0 else " down" if value < 0 else "") if signed else ""
    return f'<td class="number{colour}" data-value="{float(value):.6g}">{number(value, signed)}</td>'


def table(head, rows, css=""):
    """head: [(name, class)], escaped here. rows: lists of ready <td> cells."""
    heads = "".join(f'<th class="{css_class}" scope="col">{escape(name)}</th>' for name, css_class in head)
    body = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    rows_html = f"<thead><tr>{heads}</tr></thead><tbody>\n{body}\n</tbody>"
    return f'<div class="scroll"><table class="{css}">{rows_html}</table></div>'


def cell(text, css=""):
    return f'<td class="{css}">{escape(text)}</td>'


def figure(title, caption, svg, wide=False):
    """svg is markup of ours; the rest is escaped."""
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    css = ' class="wide"' if wide else ""
    head = f'<div class="title">{escape(title)}</div>'
    return f"<figure{css}>{head}{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def details(title, body):
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def document(title, body):
    """The whole page."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
