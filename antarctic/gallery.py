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
from antarctic.files import atomic, make_folder, remove, sync_folder, writing
from antarctic.gallery_page import SCRIPT, STEPS, head
from antarctic.images import read_image
from antarctic.leftovers import remove_leftovers

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


def words_of(text):
    return set(re.findall(r"\w+", text.lower()))


def graded(table, caption):
    """The entries of a table as a list of (entry, cosine, whether its words are in the caption, how
    well it fits beside the others, from 0 to 1). table: a list of (entry, cosine)."""
    words, cosines = words_of(caption), [cosine for _, cosine in table]
    low, high = min(cosines, default=0), max(cosines, default=1)
    grades = []
    for entry, cosine in table:
        own = words_of(entry)
        used = bool(own) and own <= words
        grades.append((entry, cosine, used, (cosine - low) / (high - low or 1)))
    return grades


def spelled(caption, table):
    """Each run of words of a caption and what lies between them, as a list of (text, the place in
    the table of the entry that spells the word there, or None). Of several entries it is the
    shortest one. table: a list of (entry, cosine)."""
    parts = re.split(r"(\w+)", caption)  # the words are at odd places
    words, places, lengths = [part.lower() for part in parts[1::2]], {}, {}
    for place, (entry, _) in enumerate(table):
        own = re.findall(r"\w+", entry.lower())
        for start in range(len(words) - len(own) + 1):
            if words[start:start + len(own)] != own:
                continue
            for i in range(start, start + len(own)):
                if i not in places or len(own) < lengths[i]:
                    places[i], lengths[i] = place, len(own)
    return [(part, places.get(i // 2) if i % 2 else None) for i, part in enumerate(parts)]


def caption_words(record):
    """A record's caption as HTML. With maps, each word that an entry spells points to the entry,
    which has the map."""
    if "where" not in record:
        return as_text(record["caption"])
    words = "".join(html.escape(text) if place is None else
                    f'<span data-of="{place}">{html.escape(text)}</span>'
                    for text, place in spelled(record["caption"], record["table"]))
    return f"<bdi>{words}</bdi>"


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
    (text, CLIP's cosine, likelihood), of which the first ten are shown, and references."""
    lists = [
        (f"{len(entries)} more of the table", "ol", entries),
        (counted(len(candidates), "candidate"), "ul",
         [f"<li>{as_text(text)} · CLIP {cosine:.3f}" for text, cosine, _ in candidates[:10]]),
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
    return (f'<div class="card" data-score="{record["score"]:.5f}"{box_attributes(where)}>'
            f'<figure popover id="i{number}"><button popovertarget="i{number}">{image}</button>'
            f'<figcaption><div class="caption">{caption_words(record)}</div>'
            f'<div class="small">{as_text(name)} · CLIP {record["score"]:.3f}</div></figcaption>'
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
