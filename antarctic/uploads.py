"""Files between the page and its visitors: examples, small pictures, downloads, a folder that is
emptied."""

import html
import io
import time
import zipfile
from pathlib import Path
from tempfile import mkdtemp

from antarctic.files import atomic
from antarctic.images import read_image
from antarctic.results import write_csv

MOST_IMAGES = 500  # of "Many" at a time
KEPT_SECONDS = 6 * 3600  # an upload that nobody asks for
COLUMNS = "file", "caption", "score"


class Folder:
    """The page's temporary folder. What is in it when keep() is called stays; other files are
    removed once they are old. Attribute: path."""

    def __init__(self, path):
        self.path, self.kept, self.swept = Path(path), set(), 0.0

    def keep(self):
        self.kept = set(self.path.rglob("*"))

    def sweep(self, now=None):
        """Removes old files, once a minute at most. now: the time in seconds."""
        now = now or time.time()
        if now < self.swept + 60:
            return
        self.swept = now
        for path in self.path.rglob("*"):
            try:
                if path not in self.kept and path.lstat().st_mtime < now - KEPT_SECONDS:
                    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            except OSError:  # a folder that holds newer files, or one that is gone
                pass

    def picture(self, image, name, side, kind="JPEG"):
        """Writes an image of at most `side` pixels each way, as a browser can show it. Returns its
        path."""
        image = image.copy()
        image.thumbnail((side, side))
        path = Path(mkdtemp(dir=self.path)) / f"{name}.{kind.lower()}"
        image.save(path, kind, **({"quality": 90} if kind == "JPEG" else {}))
        return str(path)


def examples_of(folder, paths):
    """Copies of images for the page, of at most 1,024 pixels each way: a list of paths. Those that
    cannot be read are left out. folder: a Folder."""
    examples = []
    for path in paths:
        try:
            image = read_image(path)
        except OSError:
            continue
        kind = "PNG" if max(image.size) <= 256 else "JPEG"  # drawings stay as they are
        examples.append(folder.picture(image, "example", 1024, kind))
    return examples


def names_of(paths):
    """A name for each upload that no other has: dog.jpg, dog-2.jpg. paths: as they were stored."""
    names, taken = [], set()
    for path in map(Path, paths):
        name, number = path.name, 1
        while Path(name).stem.casefold() in taken:
            number += 1
            name = f"{path.stem}-{number}{path.suffix}"
        taken.add(Path(name).stem.casefold())
        names.append(name)
    return names


def write_downloads(folder, records):
    """Writes captions.csv, and captions.zip with dog.txt for dog.jpg. Returns their paths.

    folder: a Folder. records: (name, caption, score), names of names_of().
    """
    place = Path(mkdtemp(dir=folder.path))
    write_csv(place / "captions.csv", COLUMNS, records)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, caption, _ in records:
            archive.writestr(f"{Path(name).stem}.txt", caption + "\n")
    with atomic(place / "captions.zip", "wb") as file:
        file.write(buffer.getvalue())
    return [str(place / "captions.csv"), str(place / "captions.zip")]


def list_html(names, reasons, done, total, seconds):
    """The state of "Many" as HTML. reasons: {name: why it could not be captioned}."""
    bad = "".join(f"<li>{html.escape(name)}: {html.escape(str(reason))}</li>"
                  for name, reason in list(reasons.items())[:20])
    listed = f"<p>Left out: {len(reasons)}</p><ul>{bad}</ul>" if reasons else ""
    return (f'<div class="ac-card" role="status"><p>{done} of {total} images, {seconds:.1f} '
            f'seconds</p><progress max="{total}" value="{done}">{done}</progress>{listed}</div>')
