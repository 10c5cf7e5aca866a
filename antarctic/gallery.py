"""A page to look at: each image with its caption, and the cache entries and candidates that the
caption comes from."""

import base64
import hashlib
import html
import io
import re
from itertools import zip_longest
from pathlib import Path
from urllib.parse import quote

from antarctic.errors import InputError, counted
from antarctic.evidence import (
    cover,
    from_nowhere,
    graded,
    pieces,
    stem,
    stems,
    words_in_order,
    words_of,
)
from antarctic.files import atomic, make_folder, remove, sync_folder, writing
from antarctic.gallery_page import SCRIPT, STEPS, head
from antarctic.images import read_image
from antarctic.leftovers import remove_leftovers
from antarctic.words import fold

# A page of more images has them as files beside it, which a browser reads when they come into
# sight. Up to here it is one file, which opens in half a second.
MOST_INLINE = 500
SIDE = 384  # pixels of an image's longer side at most: enough to look at it enlarged
ENTRIES = 24  # of a table that a card shows; the others are folded
IMAGE_NAME = re.compile(r"[0-9a-f]{16}\.jpg")  # of an image beside a page


# ----------------------------------------------------------------------------------------- images

def thumbnail(path, read=read_image, side=SIDE):
    """An image as (bytes of a JPEG of at most `side` pixels each way, its width and height); None
    where the file cannot be read any more. read: read_image, or the same with other settings."""
    try:
        image = read(path)
    except OSError:
        return None
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue(), image.size


def data_uri(jpeg):
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


class ImagesBeside:
    """The folder gallery_files of a page gallery.html, which holds the page's images.

    An image's name is a hash of its content, so that an earlier page keeps its own until the new
    one is whole. Raises InputError where the folder cannot be written.
    """

    def __init__(self, page):
        self.folder, self.names = Path(page).with_name(f"{Path(page).stem}_files"), set()

    def add(self, jpeg):
        """Writes an image. Returns its address, relative to the page."""
        if not self.names:
            self.make_folder()
        name = f"{hashlib.sha256(jpeg).hexdigest()[:16]}.jpg"
        path = self.folder / name
        if name not in self.names and not self.has(path, jpeg):
            with atomic(path, "wb", sync=False) as file:
                file.write(jpeg)
        self.names.add(name)
        return f"{quote(self.folder.name)}/{name}"

    def sync(self):
        """Returns once the images are on the disk under their names, as atomic() without sync
        leaves to do."""
        if self.names:
            with writing(self.folder):
                sync_folder(self.folder)

    def make_folder(self):
        with writing(self.folder):
            make_folder(self.folder)
        if self.folder.is_symlink():
            raise InputError(f"{self.folder} is a link, and the page's images go into a folder of "
                             f"its own; remove the link")

    def has(self, path, jpeg):
        """Whether a file holds these bytes, from an earlier run. One that cannot be read is written
        anew."""
        try:
            if path.is_symlink() or not path.is_file() or path.stat().st_size != len(jpeg):
                return False
            return path.read_bytes() == jpeg
        except OSError:
            return False

    def remove_others(self):
        """Removes the images of earlier pages, and the folder where nothing is left in it."""
        if self.folder.is_symlink() or not self.folder.is_dir():
            return
        with writing(self.folder):
            remove_leftovers(self.folder)
            remove(*(path for path in self.folder.iterdir() if IMAGE_NAME.fullmatch(path.name)
                     and path.name not in self.names and not path.is_dir()))
            if not any(self.folder.iterdir()):
                self.folder.rmdir()


# ------------------------------------------------------------------------------------------- HTML

def as_text(text):
    """HTML that shows a text as it is. Marks of the reading direction have no effect beyond it."""
    return f"<bdi>{html.escape(text)}</bdi>"


def caption_text(caption, table, known=None, pointing=False):
    """A caption as HTML. Words that no entry of its table says are underlined. known: words, a set;
    others are marked. pointing: whether each word that an entry spells points to the entry, which
    has a map."""
    missing, parts = from_nowhere(caption, table), pieces(caption)
    places = spelled(parts[1::2], table) if pointing else {}

    def shown(place, word):
        text = html.escape(word)
        if stems(word) & missing:
            text = f'<u title="no entry of the table says this">{text}</u>'
        if place in places:
            text = f'<span data-of="{places[place]}">{text}</span>'
        return text if known is None or words_of(word) <= known else f"<mark>{text}</mark>"

    parts[1::2] = [shown(*each) for each in enumerate(parts[1::2])]
    parts[::2] = map(html.escape, parts[::2])
    return f"<bdi>{''.join(parts)}</bdi>"


def cover_text(caption, table):
    """How much of a caption its table says, or "" where it has no words."""
    share = cover(caption, table)
    return "" if share is None else f" · {share:.0%} of its words are in the table"


def spelled(words, table):
    """{place of a word of a caption: place in the table of the entry that spells it there}, of
    several entries the shortest one. words: of the caption. table: a list of (entry, cosine)."""
    words, places, lengths = [stem(fold(word)) for word in words], {}, {}
    for place, (entry, _) in enumerate(table):
        own = list(map(stem, words_in_order(entry)))
        for start in range(len(words) - len(own) + 1):
            if words[start:start + len(own)] != own:
                continue
            for i in range(start, start + len(own)):
                if i not in places or len(own) < lengths[i]:
                    places[i], lengths[i] = place, len(own)
    return places


def entry_items(table, caption, maps=()):
    """The entries of a table as HTML, each a bar that is longer where the entry fits better. Those
    whose words are in the caption are marked.

    table: a list of (entry, cosine). maps: of the entries, see antarctic.seen. Returns a list of
    strings.
    """
    return [f'<li class="b{round(STEPS * (0.1 + 0.9 * fit))}{" used" * used}"'
            f'{map_attributes(found)}>{as_text(entry)} {cosine:.3f}'
            for (entry, cosine, used, fit), found in zip_longest(graded(table, caption), maps)]


def map_attributes(found):
    """The attributes of an entry's element. found: its map, see antarctic.seen, or None."""
    if not found:
        return ""
    x, y, text = found
    return f' data-map="{text}" data-at="{x} {y}" tabindex="0"'


def box_attributes(where):
    """The attributes of the element that holds the entries. where: of a record, or None."""
    if not where:
        return ""
    return f' data-box="{" ".join(map(str, where["box"]))}" data-side="{where["side"]}"'


def folded(entries, candidates, references):
    """What opens at a click on the numbers of it, as HTML: the items of more entries, candidates
    (text, score, likelihood), of which the first ten are shown, and references."""
    lists = [
        (f"{len(entries)} more of the table", "ol", entries),
        (counted(len(candidates), "candidate"), "ul",
         [f"<li>{as_text(text)} · {score:.3f}" for text, score, _ in candidates[:10]]),
        (counted(len(references), "reference"), "ul",
         [f"<li>{as_text(text)}" for text in references])]
    lists = [(name, tag, "".join(items)) for name, tag, items in lists if items]
    if not lists:
        return ""
    summary = ", ".join(name for name, _, _ in lists)
    content = "".join(f'<{tag} aria-label="{name}">{items}</{tag}>' for name, tag, items in lists)
    return f"<details><summary>{summary}</summary>{content}</details>"


def image_tag(image, source, alt):
    """The HTML of an image. image: of thumbnail. source: a function of its bytes that gives their
    address."""
    if image is None:
        return f'<img src="data:," alt="{html.escape(alt)}">'
    jpeg, (width, height) = image
    return (f'<img src="{source(jpeg)}" alt="{html.escape(alt)}" width="{width}" '
            f'height="{height}" loading="lazy" decoding="async">')


def gallery_card(number, record, references, source=data_uri, read=read_image):
    """One image of the gallery as HTML: the picture, its caption, and the evidence.

    number: of the card on its page. record: a line of details.jsonl. references: the image's
    captions in the data set. source: see image_tag. read: see thumbnail.
    """
    name = str(record["image_id"])
    image = image_tag(thumbnail(record["file"], read), source, record["caption"] or name)
    where = record.get("where", {})
    entries = entry_items(record["table"], record["caption"], where.get("maps", ()))
    caption = caption_text(record["caption"], record["table"], pointing=bool(where))
    return (f'<div class="card" data-score="{record["score"]:.5f}"{box_attributes(where)}>'
            f'<figure popover id="i{number}"><button popovertarget="i{number}">{image}</button>'
            f'<figcaption><div class="caption">{caption}</div>'
            f'<div class="small">{as_text(name)} · score {record["score"]:.3f}'
            f'{cover_text(record["caption"], record["table"])}</div></figcaption>'
            f'</figure><ol>{"".join(entries[:ENTRIES])}</ol>'
            f'{folded(entries[ENTRIES:], record["candidates"], references)}</div>\n')


def write_gallery(path, title, sections, read=read_image, most_inline=MOST_INLINE):
    """Writes an HTML page, which shows every text of a user as text. It holds its images, or has
    them in a folder beside it where they are more than most_inline. Images of an earlier page in
    that folder are removed.

    sections: (heading, remark, records, references) each. records: as in details.jsonl, any
    iterable. references: a list of tuples, one a record. read: see thumbnail. Raises InputError
    where the page or its images cannot be written.
    """
    beside, number = ImagesBeside(path), 0
    many = sum(len(references) for *_, references in sections) > most_inline
    with atomic(path) as file:
        file.write(head(title, "'self' data:" if many else "data:"))
        for heading, remark, records, references in sections:
            file.write(f'<section><h2>{as_text(heading)}</h2><p>{as_text(remark)}</p>'
                       f'<div class="grid">\n')
            for record, captions in zip(records, references):
                source = beside.add if many else data_uri
                file.write(gallery_card(number, record, captions, source, read))
                number += 1
            file.write("</div></section>\n")
        file.write(f"<script>{SCRIPT}</script>\n</html>\n")
        beside.sync()
    beside.remove_others()
