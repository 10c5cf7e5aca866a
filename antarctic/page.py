"""The page's parts as HTML: a caption with its evidence, before and after, a search in the words.

Every text of a user, an entry or a model goes through as_text(), so that it is shown as text.
"""

import html
from itertools import zip_longest

from antarctic.evidence import graded, words_of
from antarctic.gallery import as_text, box_attributes, caption_text, cover_text, map_attributes

SHOWN = 10  # candidates; the others are folded away

WELCOME = """<div class="ac-head"><h1>A captioner whose vocabulary is a text file</h1>
<p>Give it an image. A model that compares images with words (CLIP) picks the lines of its
vocabulary that fit best. A language model (BART) writes a few captions from these lines, and CLIP
keeps the one that fits best. What it cannot name, you can teach it: write the word into
<b>Your words</b>.</p></div>"""
WAITING = """<div class="ac-card ac-empty"><p>The caption appears here, with the words that it was
made of. Drop an image, paste one, use the camera, or choose an example.</p></div>"""
LEGEND = """<p class="ac-small">Bars show how well an entry fits the image (CLIP's cosine: higher is
better; names from photos add to a caption's score). ✓ marks entries whose words are in the caption;
words of the caption that no entry says are underlined.%s</p>"""
POINTING = """ Point at an entry, or at a word that an entry spells, and the image is dark where its
score did not come from."""
CHANGES = " Yellow is what your words brought; struck out is what they drove out of the table."
HELP = """<div class="ac-card"><h3>What the page does with your images</h3>
<p>Images are read on the machine that runs this page, in a folder that is deleted when it stops.
Your words, and names from photos, count for you alone. They are gone when you close the page,
unless you save them: then CLIP's vectors of the photos are kept, no photos.</p>
<h3>What the captions are worth</h3>
<p>The models know what they were trained on. Captions can be wrong, and can name what is not in
the image: look at the words and scores beside them.</p></div>"""

CSS = """
.ac-head h1 { font-size: 1.5rem; margin: 0 0 .3rem }
.ac-head p { max-width: 60rem; margin: 0 }
.ac-card { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 14px 16px;
  background: var(--background-fill-primary); color: var(--body-text-color);
  overflow-wrap: anywhere }
.ac-empty { min-height: 11rem; display: flex; align-items: center }
.ac-card h3 { font-size: .8rem; margin: 0 0 .25rem; font-weight: 600 }
.ac-sides { display: grid; gap: 12px; grid-template-columns: minmax(0, 1fr) }
@media (min-width: 1000px) { .ac-sides.two { grid-template-columns: 1fr 1fr } }
.ac-caption { font-size: 1.55rem !important; line-height: 1.25; font-weight: 650;
  margin: 0 0 .35rem !important }
.two .ac-caption { font-size: 1.25rem !important; min-height: 3.8rem }
.ac-card mark, .ac-card mark * { background: #ffe28a; color: #1c1c1c !important }
.ac-card mark { border-radius: 4px; padding: 0 .15em }
.ac-small { font-size: .82rem !important; margin: .2rem 0 .6rem !important; opacity: .8 }
.ac-bars { list-style: none !important; margin: .3rem 0 0 !important; padding: 0 !important }
.ac-bars li { display: grid; grid-template-columns: 1em minmax(4.5em, 8.5em) 1fr 3em; gap: 7px;
  align-items: center; font-size: .88rem; margin: 2px 0 !important; padding: 0 }
.ac-bar { display: block; height: .7em; border-radius: 4px; background: #9fb1c4; min-width: 2px }
.ac-used .ac-bar { background: #2e9463 }
.ac-used .ac-entry { font-weight: 600 }
.ac-caption u { text-decoration: underline dotted }
.ac-number { text-align: right !important; font-variant-numeric: tabular-nums; width: 1%;
  white-space: nowrap; overflow-wrap: normal }
.ac-card [data-map], .ac-card [data-of] { cursor: crosshair; border-radius: 4px }
.ac-card .ac-lit { outline: 2px solid #2e9463; outline-offset: 1px }
#photo canvas.ac-veil { position: absolute; object-fit: contain; pointer-events: none }
.ac-wrong { display: flex; flex-wrap: wrap; gap: 6px }
.ac-wrong img { width: 84px; height: 84px; object-fit: contain; border-radius: 6px;
  background: var(--background-fill-secondary) }
.ac-gone .ac-entry { text-decoration: line-through; opacity: .75 }
.ac-card table { width: 100%; border-collapse: collapse; font-size: .88rem; border: 0 !important;
  margin: .8rem 0 0 !important }
.ac-card tr { border: 0 !important; background: none !important }
.ac-card th { text-align: left; font-weight: 500; opacity: .8 }
.ac-card td, .ac-card th { padding: 3px 10px 3px 0 !important; vertical-align: top;
  border: 0 !important }
.ac-card td:last-child, .ac-card th:last-child { padding-right: 0 !important }
.ac-won td { font-weight: 600 }
.ac-card summary { cursor: pointer; font-size: .85rem; margin-top: .5rem }
.ac-problem { border-color: #c0392b; border-left-width: 5px }
.ac-code { display: block; font-family: ui-monospace, monospace; font-size: .8rem; padding: 8px;
  background: var(--background-fill-secondary); border-radius: 6px; white-space: pre-wrap }
"""


def problem(message):
    """A sentence that says what did not work, as HTML."""
    return f'<div class="ac-card ac-problem" role="alert">{as_text(str(message))}</div>'


def bars(table, caption, new=(), gone=(), maps=()):
    """A table as bars, in HTML.

    table: a list of (entry, cosine). caption: marks the entries whose words it holds. new, gone:
    entries that are marked as what came, or what went, with the visitor's words. maps: of the
    entries, see antarctic.seen.
    """
    rows = []
    for (entry, cosine, used, fit), found in zip_longest(graded(table, caption), maps):
        kinds = " ".join(name for name, holds in (("ac-used", used), ("ac-new", entry in new),
                                                  ("ac-gone", entry in gone)) if holds)
        name = f"<mark>{as_text(entry)}</mark>" if entry in new else as_text(entry)
        tick = '<span title="in the caption">✓</span>' if used else "<span></span>"
        width = 12 + 88 * fit
        rows.append(f'<li class="{kinds}"{map_attributes(found)}>{tick}'
                    f'<span class="ac-entry">{name}</span><span><span '
                    f'class="ac-bar" style="width:{width:.0f}%"></span></span>'
                    f'<span class="ac-number">{cosine:.3f}</span></li>')
    return f'<ol class="ac-bars">{"".join(rows)}</ol>'


def candidate_rows(candidates, first=0):
    rows = []
    for place, (text, cosine, likelihood) in enumerate(candidates, first):
        won = ' class="ac-won"' if place == 0 else ""
        star = " ★ chosen" if place == 0 else ""
        rows.append(f'<tr{won}><td>{as_text(text)}{star}</td>'
                    f'<td class="ac-number">{cosine:.3f}</td>'
                    f'<td class="ac-number">{likelihood:.2f}</td></tr>')
    return "".join(rows)


def candidates_html(candidates):
    """The candidates as an HTML table, best first. candidates: (text, cosine, likelihood)."""
    head = ('<tr><th scope="col">candidates</th><th scope="col" class="ac-number" '
            'title="CLIP\'s cosine with the image; names from photos add to it">score</th>'
            '<th scope="col" class="ac-number" title="the mean log-probability of a token">BART'
            '</th></tr>')
    table = f"<table>{head}{candidate_rows(candidates[:SHOWN])}</table>"
    if len(candidates) > SHOWN:
        more = candidate_rows(candidates[SHOWN:], SHOWN)
        table += (f"<details><summary>{len(candidates) - SHOWN} more</summary>"
                  f"<table>{more}</table></details>")
    return table


def side(result, heading, where=None, other=None, after=False):
    """One caption with its evidence, as HTML. result: a model.Caption. where: the maps of its
    table, or None. other: the Caption beside it, or None. after: whether this one is with the
    visitor's words."""
    known = words_of(other.caption) if after and other else None
    caption = caption_text(result.caption, result.table, known, pointing=bool(where))
    if not result.caption:
        caption = "no caption: every candidate held a banned word"
    new = gone = ()
    if other:
        changed = {entry for entry, _ in result.table} - {entry for entry, _ in other.table}
        new, gone = (changed, ()) if after else ((), changed)
    name = 'class="ac-caption" id="caption"' if after or other is None else 'class="ac-caption"'
    maps = where["maps"] if where else ()
    return (f'<section class="ac-card"{box_attributes(where)}><h3>{as_text(heading)}</h3>'
            f'<p {name}>{caption}</p>'
            f'<p class="ac-small">score {result.score:.3f}'
            f'{cover_text(result.caption, result.table)}</p>'
            f'{bars(result.table, result.caption, new, gone, maps)}'
            f'{candidates_html(result.candidates)}</section>')


def caption_html(result, seconds, before=None, where=(None, None)):
    """The result as HTML. result: the model.Caption. seconds: that it took. before: the Caption
    without the visitor's words, or None where there are none. where: the maps of both tables, see
    antarctic.seen, or None."""
    if before is None:
        sides, kind = side(result, "Caption", where[0]), ""
    else:
        sides = (side(result, "With your words", where[0], before, after=True)
                 + side(before, "Before", where[1], result))
        kind = " two"
    return (f'<div class="ac-result" aria-live="polite"><div class="ac-sides{kind}">{sides}</div>'
            f'<p class="ac-small">captioned in {seconds:.2f} seconds</p>'
            f'{LEGEND % ((POINTING if where[0] else "") + (CHANGES if before else ""))}</div>')


def search_html(found):
    """Why a text is in the table or not, as HTML. found: see Studio.search."""
    text, rank, entries = as_text(found["text"]), found["rank"], found["entries"]
    kept, takes = found["kept"], f"the best {found['topk']}"
    if found["shortlist"] > found["topk"]:
        takes = f"up to {found['topk']} of the best {found['shortlist']}, which say other things"
    if found["known"]:
        verdict = (f"“{text}” is in the vocabulary, number {rank:,} of {entries:,} for this image. "
                   f"The table takes {takes}, and it is {'in' if kept else 'not in'} it.")
    else:
        verdict = (f"“{text}” is not in the vocabulary. Number {rank:,} would be its place among "
                   f"the {entries:,} entries. The table takes {takes}: as a line of "
                   f"your words it would {'be in it' if kept else 'still be left out'}.")
    rows = "".join(f"<tr><td>{as_text(entry)}</td><td class='ac-number'>{cosine:.3f}</td>"
                   f"<td class='ac-number'>{place:,}</td></tr>"
                   for entry, cosine, place in found["others"])
    listed = ""
    if rows:
        listed = (f'<table><tr><th scope="col">entries that hold it</th><th scope="col" '
                  f'class="ac-number">cosine</th><th scope="col" class="ac-number">place</th></tr>'
                  f'{rows}</table>')
    return (f'<div class="ac-card"><p>{verdict}</p><p class="ac-small">cosine '
            f'{found["cosine"]:.3f}; the last entry of the table has {found["last"]:.3f}</p>'
            f'{listed}</div>')


def told_html(text):
    """A text that answers a click, as HTML."""
    return f'<div class="ac-card" role="status">{as_text(text)}</div>'


def verdicts_html(verdicts, wrong):
    """What the visitor's names are worth, as HTML. verdicts: a verdicts.Verdict each, the new one
    first. wrong: data: URIs of other photos that would wrongly get the new name."""
    lines = "".join(f"<p>{as_text(str(verdict))}.</p>" for verdict in verdicts)
    remarks = dict.fromkeys(remark for verdict in verdicts for remark in verdict.remarks)
    lines += "".join(f'<p class="ac-small">{as_text(remark)}</p>' for remark in remarks)
    if wrong:
        name = html.escape(verdicts[0].thing.name)
        pictures = "".join(f'<img src="{uri}" alt="wrongly {name}">' for uri in wrong)
        lines += (f'<p class="ac-small">These would wrongly be <bdi>{name}</bdi>, the most alike '
                  f'first:</p><div class="ac-wrong">{pictures}</div>')
    return f'<div class="ac-card" role="status">{lines}</div>'


def saved_html(files, command):
    """What "Save" wrote, and the command that uses it, as HTML. files: paths."""
    listed = ", ".join(map(as_text, files))
    return (f'<div class="ac-card" role="status"><p>Saved on the machine that runs this page: '
            f'{listed}</p><p>This command uses them:</p><code class="ac-code" tabindex="0">'
            f'{as_text(command)}</code></div>')
