"""The head of the gallery's page: its policy, style sheet and tools, and the script of these."""

import base64
import hashlib
import html

STEPS = 20  # lengths of a bar; the policy lets no element have a style of its own

# The page loads nothing but its images, and its policy lets no text of a user do so. It runs the
# script below, known by its hash, and no other. Without scripts all but the tools is there.
HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="%s">
<title>%s</title>
<style>%s</style>
<h1>%s</h1>
<p class="small">Under each caption are the cache entries that it was written from, as they were
chosen, with the cosine of each with the image. Green entries have their words in the caption; words
that no entry says are underlined. A caption's score is its cosine with the image, to which names
from photos add. A click on an image enlarges it.</p>
<div class="tools" role="search" hidden>
<input type="search" aria-label="Search" autocomplete="off" spellcheck="false"
 placeholder="Words of captions, entries and names">
<select aria-label="Order" autocomplete="off">
<option value="0">order of the images</option>
<option value="1">score, highest first</option>
<option value="-1">score, lowest first</option>
</select>
<output></output>
</div>
"""

STYLE = """
:root { color-scheme: light dark; --page: #f4f6f8; --card: #fff; --text: #1c2430; --dim: #5a6573;
  --line: #d5dbe2; --bar: #e3e8ee; --used: #b9e2c8; --focus: #1a73e8 }
@media (prefers-color-scheme: dark) {
  :root { --page: #12161b; --card: #1c2229; --text: #e4e9ef; --dim: #9aa6b3; --line: #3b4652;
    --bar: #323c47; --used: #24573a; --focus: #8ab4f8 }
}
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1240px;
  padding: 0 1rem; color: var(--text); background: var(--page) }
h1 { font-size: 1.5rem }
h2 { font-size: 1.15rem; margin: 2rem 0 .2rem }
h2 + p { margin: 0 0 .8rem; color: var(--dim) }
.small { color: var(--dim); font-size: .82rem }
:focus-visible { outline: 3px solid var(--focus); outline-offset: 2px }

.tools { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 8px 12px;
  align-items: center; padding: 10px 0; background: var(--page) }
input, select { font: inherit; color: inherit; background: var(--card); padding: 6px 10px;
  border: 1px solid var(--line); border-radius: 8px; box-sizing: border-box }
input { flex: 1 1 16rem; min-width: 0 }
output { color: var(--dim); font-variant-numeric: tabular-nums }

.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr));
  gap: 14px }
.card { background: var(--card); border-radius: 10px; padding: 12px; box-shadow: 0 1px 3px #0003;
  overflow-wrap: anywhere; content-visibility: auto; contain-intrinsic-size: auto 320px }
figure { all: unset; display: flex; gap: 12px; min-height: 148px }
figure button { all: unset; flex: none; width: 148px; height: 148px; cursor: zoom-in }
figure button:focus-visible { outline: 3px solid var(--focus); outline-offset: 2px;
  border-radius: 6px }
img { display: block; width: 100%; height: 100%; object-fit: contain; border-radius: 6px;
  background: var(--bar) }
figure button { position: relative }
canvas { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain;
  border-radius: 6px; pointer-events: none }
[data-map], [data-of] { cursor: crosshair }
.lit { outline: 2px solid var(--focus); outline-offset: 1px }
figcaption { min-width: 0 }
.caption { font-size: 1.08rem; font-weight: 600 }
u { text-decoration: underline dotted }
ol { list-style: none; columns: 2; column-gap: 10px; margin: 10px 0 6px; padding: 0;
  font-size: .8rem }
ol li { display: flex; justify-content: space-between; gap: 8px; margin: 0 0 3px; padding: 1px 6px;
  border-radius: 4px; break-inside: avoid; font-variant-numeric: tabular-nums;
  overflow-wrap: normal;
  background: linear-gradient(var(--bar), var(--bar)) no-repeat 0 0 / var(--long) 100% }
ol bdi { min-width: 0; overflow-wrap: anywhere }
.used { --bar: var(--used) }
.used bdi { font-weight: 600 }
details { font-size: .84rem }
summary { cursor: pointer; border-radius: 4px }
ul { margin: 6px 0; padding-left: 1.2rem }
ul::before { content: attr(aria-label); color: var(--dim); margin-left: -1.2rem }
ul li { margin: 1px 0 }

figure:popover-open { position: fixed; inset: 0; margin: auto; width: fit-content;
  height: fit-content; max-width: 94vw; max-height: 96vh; box-sizing: border-box; overflow: auto;
  padding: 12px; flex-direction: column; background: var(--card); color: var(--text);
  border-radius: 10px; overflow-wrap: anywhere }
figure:popover-open button { width: auto; height: auto; cursor: zoom-out }
figure:popover-open img { width: min(88vw, 720px); height: auto; max-height: 78vh;
  background: none }
figure:popover-open figcaption { width: min(88vw, 720px) }
figure:popover-open + ol { margin-top: 158px }  /* keeps the figure's place */
figure::backdrop { background: #000b }

@media print {
  :root { --page: #fff; --card: #fff; --text: #000; --dim: #444; --line: #ccc; --bar: #e3e8ee;
    --used: #b9e2c8 }
  body { margin: 0; max-width: none; print-color-adjust: exact }
  .tools { display: none }
  .grid { grid-template-columns: 1fr 1fr }
  .card { content-visibility: visible; break-inside: avoid; border: 1px solid var(--line);
    box-shadow: none }
}
.card[hidden], section[hidden] { display: none }
.tools[hidden] { visibility: hidden }  /* nothing moves when the script has been read */
@media (scripting: none) { .tools[hidden] { display: none } }
"""

# Darkens an image where a map has no share, and outside of its box. The canvas lies over the image.
# card, entry: the elements that hold the box, and the map with its peak, see gallery.
VEIL = """
const veilOver = (image, card, entry) => {
  const veil = document.createElement("canvas"), grid = document.createElement("canvas");
  const width = veil.width = image.naturalWidth, height = veil.height = image.naturalHeight;
  const [left, top, right, bottom] = card.dataset.box.split(" "), side = card.dataset.side;
  const [x, y] = entry.dataset.at.split(" "), shares = atob(entry.dataset.map);
  const pixels = new ImageData(+side, +side), pen = veil.getContext("2d");
  for (let i = 0; i < shares.length; i++)
    pixels.data[4 * i + 3] = 200 * (1 - shares.charCodeAt(i) / 255);
  grid.width = grid.height = side;
  grid.getContext("2d").putImageData(pixels, 0, 0);
  const box = [left * width, top * height, (right - left) * width, (bottom - top) * height];
  pen.fillStyle = "rgb(0 0 0 / .78)";
  pen.fillRect(0, 0, width, height);
  pen.clearRect(...box);
  pen.drawImage(grid, ...box);
  pen.strokeStyle = "#fff";
  pen.lineWidth = Math.min(width, height) / 100;
  pen.arc(x * width, y * height, 3 * pen.lineWidth, 0, 7);
  pen.stroke();
  image.after(veil);
  return veil;
};
"""

# A typed word is found where a word begins. Scripts without capital letters, some of which have no
# spaces either, are searched anywhere.
SCRIPT = VEIL + r"""
const tools = document.querySelector(".tools"), [search, order, count] = tools.children;
const cards = [...document.querySelectorAll(".card")];
const all = cards.length + (cards.length == 1 ? " image" : " images");
let texts;
const textOf = card => [...card.querySelectorAll("figcaption bdi, ol bdi")]
  .map(part => part.textContent).join("\n").normalize();
const patternOf = word => new RegExp(
  "(?<!\\p{Cased}(?=\\p{Cased}))" + word.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"), "iu");
search.oninput = () => {
  const patterns = search.value.normalize().split(/\s+/).filter(Boolean).map(patternOf);
  texts ??= cards.map(textOf);
  let found = 0;
  cards.forEach((card, i) => {
    card.hidden = !patterns.every(pattern => pattern.test(texts[i]));
    found += !card.hidden;
  });
  for (const section of document.querySelectorAll("section"))
    section.hidden = !section.querySelector(".card:not([hidden])");
  count.value = patterns.length ? `${found} of ${all}` : all;
};
order.onchange = () => {
  [...cards].sort((a, b) => order.value * (b.dataset.score - a.dataset.score))
    .forEach(card => card.parentNode.append(card));
};
document.onkeydown = event => {
  const open = document.querySelector("figure:popover-open");
  const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (!open || !step) return;
  const shown = [...document.querySelectorAll(".card:not([hidden]) figure")];
  const next = shown[shown.indexOf(open) + step];
  if (!next) return;
  event.preventDefault();
  open.hidePopover();
  next.firstElementChild.focus();
  next.showPopover();
};
let lit = [];
const light = event => {
  const source = event.target.closest("[data-map], [data-of]"), card = source?.closest(".card");
  lit.forEach(part => part.localName == "canvas" ? part.remove() : part.classList.remove("lit"));
  const entry = source?.dataset.of ? card.querySelectorAll("ol li")[source.dataset.of] : source;
  lit = entry?.dataset.map ? [veilOver(card.querySelector("img"), card, entry), entry, source] : [];
  lit.slice(1).forEach(part => part.classList.add("lit"));
};
document.addEventListener("pointerover", light);
document.addEventListener("focusin", light);
count.value = all;
tools.hidden = false;
"""


def head(title, images):
    """The page up to its first section. images: where its policy lets images come from."""
    style = STYLE + "".join(f".b{i} {{ --long: {100 * i // STEPS}% }}\n" for i in range(STEPS + 1))
    policy = (f"default-src 'none'; img-src {images}; style-src {source_of(style)}; "
              f"script-src {source_of(SCRIPT)}; base-uri 'none'; form-action 'none'")
    return HEAD % (policy, html.escape(title), style, html.escape(title))


def source_of(text):
    """The name by which a policy allows an inline script or style sheet."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
