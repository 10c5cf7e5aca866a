"""A page to look at: each image with its caption, and the cache entries and candidates that the
caption comes from."""

import base64
import html
import io
import re

from antarctic.files import atomic
from antarctic.images import read_image

# The page needs no script and no other file, and its policy lets no text of a user load one.
HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>%s</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1240px;
  padding: 0 1rem; color: #1c2430; background: #f4f6f8 }
h1 { font-size: 1.5rem }
h2 { font-size: 1.15rem; margin: 2rem 0 .2rem }
h2 + p { margin: 0 0 .8rem; color: #56616f }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(360px, 1fr)); gap: 14px }
.card { background: #fff; border-radius: 10px; padding: 12px; box-shadow: 0 1px 3px #0002;
  overflow-wrap: anywhere }
.top { display: flex; gap: 12px }
.top img { width: 148px; height: 148px; object-fit: contain; border-radius: 6px;
  background: #eef1f4 }
.caption { font-size: 1.08rem; font-weight: 600 }
.small { color: #6a7583; font-size: .82rem }
.entries { display: flex; flex-wrap: wrap; gap: 4px; margin: 8px 0 4px }
.entry { font-size: .78rem; padding: 1px 7px; border-radius: 9px; border: 1px solid #d5dbe2 }
.used { border-color: #2f7d4f }
details { font-size: .84rem }
li { margin: 1px 0 }
</style>
<h1>%s</h1>
"""
LEGEND = """<p class=small>Under each caption are the cache entries that it was written from, best
first. Darker entries match the image better. Entries whose words are in the caption are
outlined.</p>
"""


def thumbnail(path, read=read_image, side=296):
    """An image as a data URI, a JPEG of at most `side` pixels each way; an empty one where the file
    cannot be read any more. read: read_image, or the same with other settings."""
    try:
        image = read(path)
    except OSError:
        return "data:,"
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=86)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def as_text(text):
    """HTML that shows a text as it is. Marks of the reading direction have no effect beyond it."""
    return f"<bdi>{html.escape(text)}</bdi>"


def words_of(text):
    return set(re.findall(r"\w+", text.lower()))


def entry_tags(table, caption):
    """The entries of a table as HTML. Better ones are darker, those in the caption outlined.

    table: a list of (entry, cosine).
    """
    words = words_of(caption)
    cosines = [cosine for _, cosine in table]
    low, high = min(cosines), max(cosines)
    tags = []
    for entry, cosine in table:
        used = " used" if words_of(entry) <= words else ""
        opacity = 0.08 + 0.5 * (cosine - low) / (high - low or 1)
        tags.append(f'<span class="entry{used}" title="cosine {cosine:.3f}" '
                    f'style="background:rgba(70,160,110,{opacity:.2f})">{as_text(entry)}</span>')
    return "".join(tags)


def folded_list(count, kind, items):
    """A list that opens at a click on its summary, as HTML. items: HTML of each."""
    rows = "".join(f"<li>{item}</li>" for item in items)
    return f"<details><summary>{count} {kind}</summary><ul>{rows}</ul></details>"


def gallery_card(record, references, read=read_image):
    """One image of the gallery as HTML: the picture, its caption, and the evidence.

    record: a line of details.jsonl. references: the image's captions in the data set. read: see
    thumbnail.
    """
    candidates = folded_list(
        len(record["candidates"]), "candidates",
        [f"{as_text(text)} <span class=small>CLIP {cosine:.3f}</span>"
         for text, cosine, _ in record["candidates"][:10]])
    listed = ""
    if references:
        listed = folded_list(len(references), "references", map(as_text, references))
    name = as_text(str(record["image_id"]))
    return (f'<div class="card"><div class="top">'
            f'<img alt="" src="{thumbnail(record["file"], read)}"><div>'
            f'<div class="caption">{as_text(record["caption"])}</div>'
            f'<div class="small">{name} · CLIP {record["score"]:.3f}</div></div></div>'
            f'<div class="entries">{entry_tags(record["table"], record["caption"])}</div>'
            f'{candidates}{listed}</div>\n')


def write_gallery(path, title, sections, read=read_image):
    """Writes one self-contained HTML page, which shows every text of a user as text.

    sections: (heading, remark, records, references) each. records: as in details.jsonl. references:
    a list of tuples, one a record. read: see thumbnail.
    """
    with atomic(path) as file:
        file.write(HEAD % (html.escape(title), html.escape(title)))
        file.write(LEGEND)
        for heading, remark, records, references in sections:
            file.write(f"<h2>{as_text(heading)}</h2><p>{as_text(remark)}</p><div class=grid>\n")
            for record, captions in zip(records, references):
                file.write(gallery_card(record, captions, read))
            file.write("</div>\n")
        file.write("</html>\n")
