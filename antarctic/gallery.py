"""One page to look at: each image with its caption and the cache entries and candidates that it
came from."""

import base64
import html
import io
import re

from antarctic.files import atomic
from antarctic.images import read_image

HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>%s</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1240px; padding: 0 1rem; color: #1c2430; background: #f4f6f8 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin: 2rem 0 .2rem } h2 + p { margin: 0 0 .8rem; color: #56616f }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(360px, 1fr)); gap: 14px }
.card { background: #fff; border-radius: 10px; padding: 12px; box-shadow: 0 1px 3px #0002; overflow-wrap: anywhere }
.top { display: flex; gap: 12px } .top img { width: 148px; height: 148px; object-fit: contain; border-radius: 6px; background: #eef1f4 }
.caption { font-size: 1.08rem; font-weight: 600 } .small { color: #6a7583; font-size: .82rem }
.entries { display: flex; flex-wrap: wrap; gap: 4px; margin: 8px 0 4px }
.entry { font-size: .78rem; padding: 1px 7px; border-radius: 9px; border: 1px solid #d5dbe2 }
.used { border-color: #2f7d4f } details { font-size: .84rem } li { margin: 1px 0 }
</style>
<h1>%s</h1>
"""


def thumbnail(path, side=296):
    """An image as a data URI of a JPEG of at most side pixels; nothing where it cannot be read any
    more."""
    try:
        image = read_image(path)
    except OSError:
        return "data:,"
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=86)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def as_text(text):
    """HTML that shows a text as it is, whatever marks of the reading direction are in it: they end
    with it."""
    return f"<bdi>{html.escape(text)}</bdi>"


def words_of(text):
    return set(re.findall(r"\w+", text.lower()))


def gallery_card(record, references):
    """One image of the gallery: the picture, its caption, and the evidence. record: a line of
    details.jsonl."""
    words = words_of(record["caption"])
    scores = [score for _, score in record["table"]]
    low, high = min(scores), max(scores)
    entries = "".join(
        f'<span class="entry{" used" if words_of(entry) <= words else ""}" title="cosine '
        f'{score:.3f}" '
        f'style="background:rgba(70,160,110,{0.08 + 0.5 * (score - low) / (high - low or 1):.2f})">{as_text(entry)}</span>'
        for entry, score in record["table"])
    candidates = "".join(f"<li>{as_text(text)} <span class=small>CLIP {clip:.3f}</span></li>"
                         for text, clip, _ in record["candidates"][:10])
    told = "".join(f"<li>{as_text(text)}</li>" for text in references)
    return (
        f'<div class="card"><div class="top"><img alt="" src="{thumbnail(record["file"])}"><div>'
        f'<div class="caption">{as_text(record["caption"])}</div>'
        f'<div class="small">{as_text(str(record["image_id"]))} · CLIP '
        f'{record["score"]:.3f}</div></div></div>'
        f'<div class="entries">{entries}</div>'
        f"<details><summary>{len(record['candidates'])} "
        f"candidates</summary><ul>{candidates}</ul></details>"
        + (f"<details><summary>{len(references)} references</summary><ul>{told}</ul></details>"
           if told else "") + "</div>\n")


def write_gallery(path, title, sections):
    """Writes one self-contained HTML page: no script, no other file, every text of a user shown as
    text.

    sections: (heading, remark, records, references): records as in details.jsonl, references a list
    of tuples.
    """
    with atomic(path) as file:
        file.write(HEAD % (html.escape(title), html.escape(title)))
        file.write(
            "<p class=small>Under each caption: the cache entries that it was written from, best "
            "first, darker where "
            "they match the image better; outlined where their words are in the caption.</p>\n")
        for heading, remark, records, references in sections:
            file.write(f"<h2>{as_text(heading)}</h2><p>{as_text(remark)}</p><div class=grid>\n")
            for record, told in zip(records, references):
                file.write(gallery_card(record, told))
            file.write("</div>\n")
        file.write("</html>\n")
