"""What the page answers to what its visitors do: HTML for browsers, records for programs."""

import html
import time
from pathlib import Path

import gradio as gr

from antarctic import page
from antarctic.classroom import without_name
from antarctic.errors import InputError
from antarctic.studio import Stopped
from antarctic.uploads import MOST_IMAGES, list_html, names_of, write_downloads
from antarctic.visitors import AS_IT_IS, Words, lines_of

DIALS = ("topk", "do_sample", "num_beams", "num_return_sequences", "temperature", "top_p",
         "lm_weight", "seed")
SHOWN_BY_BROWSERS = ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".avif"


def as_words(words, only, ban, own_names=()):
    return Words(*map(lines_of, (words, only, ban)), own_names)


def answer(function, *args):
    """What function(*args) returns; where the user erred, the sentence as HTML."""
    try:
        return function(*args)
    except InputError as error:
        return page.problem(error)
    except Stopped:
        return page.problem("stopped; change anything to caption again")


def for_clients(function, *args):
    """As answer, for programs: the error is raised."""
    try:
        return function(*args)
    except (InputError, Stopped) as error:
        message = html.escape(str(error) or "stopped")
        raise gr.Error(message, print_exception=False) from error


class Answers:
    """What the page answers. studio: a Studio. folder: a Folder. save_to: where "Save" writes.
    command: a function of {flag: path} of the saved files that gives the command line. story: a
    function of a caption that gives a story, or None."""

    def __init__(self, studio, folder, save_to, command, story=None):
        self.studio, self.folder = studio, folder
        self.save_to, self.command, self.story = save_to, command, story

    def record(self, photo, words, dials, visitor):
        """(the Caption without the visitor's words, or None; the Caption; seconds). words: a Words.
        dials: values of DIALS."""
        self.folder.sweep()
        dials = dict(zip(DIALS, dials))
        result, seconds = self.studio.caption(photo, words, dials, visitor)
        before = None
        if any(words):
            before, _ = self.studio.caption(photo, AS_IT_IS, dials, visitor)
        return before, result, seconds

    def show(self, photo, words, only, ban, own_names, *dials, request: gr.Request = None):
        def html_of():
            if not photo:
                return page.WAITING
            visitor, own = request and request.session_hash, as_words(words, only, ban, own_names)
            before, result, seconds = self.record(photo, own, dials, visitor)
            where = [one and self.studio.where(photo, one.table, words, visitor)
                     for one, words in ((result, own), (before, AS_IT_IS))]
            return page.caption_html(result, seconds, before, where)
        return answer(html_of)

    def teach(self, own_names, photos, name, phrase, request: gr.Request = None):
        """(the visitor's OwnNames, what was made of them as HTML). photos: uploads, or None."""
        try:
            own_names, verdicts, wrong = self.studio.teach(
                name, phrase, photos or [], own_names, request and request.session_hash)
            return own_names, page.verdicts_html(verdicts, wrong)
        except InputError as error:
            return own_names, page.problem(error)
        except Stopped:
            return own_names, page.problem("stopped; nothing was taught")

    def forget(self, own_names, name):
        """As teach(): without the name, or where it is empty without any."""
        name = " ".join(str(name or "").split())
        kept = without_name(own_names, name) if name else ()
        names = ", ".join(own.name for own in kept)
        if not own_names:
            return own_names, page.problem("you have taught no name here, so there is none to "
                                           "forget")
        if len(kept) == len(own_names):
            return own_names, page.problem(f"{name} is no name that you have taught here; you "
                                           f"have taught {names}")
        return kept, page.told_html(f"Forgotten. Names that are left: {names or 'none'}.")

    def look_up(self, text, photo, words, only, ban, own_names, topk):
        def html_of():
            if not photo:
                raise InputError("give the page an image first")
            found = self.studio.search(photo, text, as_words(words, only, ban, own_names), topk)
            return page.search_html(found)
        return answer(html_of)

    def save(self, words, only, ban, own_names):
        def html_of():
            files = self.studio.save(as_words(words, only, ban, own_names), self.save_to)
            return page.saved_html(files.values(), self.command(files))
        return answer(html_of)

    def tell(self, photo, words, only, ban, own_names, *dials, request: gr.Request = None):
        def html_of():
            if not photo:
                raise InputError("give the page an image first")
            visitor = request and request.session_hash
            own = as_words(words, only, ban, own_names)
            _, result, _ = self.record(photo, own, dials, visitor)
            if not result.caption:
                raise InputError("there is no caption to continue")
            with self.studio.turn(visitor):
                story = self.story(result.caption)
            return page.told_html(story)
        return answer(html_of)

    def preview(self, photo):
        """A picture that a browser shows, in place of an upload that most do not (HEIC, TIFF)."""
        if not photo or Path(photo).suffix.lower() in SHOWN_BY_BROWSERS:
            return gr.skip()
        try:
            path = self.folder.picture(self.studio.picture(photo), "photo", 2048)
        except InputError:
            return gr.skip()  # the caption's place says why
        return path

    def leave(self, request: gr.Request):
        self.studio.stop(request.session_hash)

    def many(self, files, words, only, ban, own_names, *dials, request: gr.Request = None):
        """Captions uploads one after the other: (state, gallery, downloads) again and again."""
        try:
            words, dials = as_words(words, only, ban, own_names), dict(zip(DIALS, dials))
            files = files or []
            if not 0 < len(files) <= MOST_IMAGES:
                raise InputError(f"give from 1 to {MOST_IMAGES} images, not {len(files)}; "
                                 f"sampler.py captions any number")
            names, records, shown, reasons = names_of(files), [], [], {}
            start = told = time.perf_counter()
            for done, (path, name) in enumerate(zip(files, names), 1):
                try:
                    result, _ = self.studio.caption(path, words, dials, request and
                                                    request.session_hash)
                    picture = self.folder.picture(self.studio.picture(path), "small", 400)
                    shown.append((picture, result.caption))
                    records.append((name, result.caption, result.score))
                except InputError as error:
                    reasons[name] = error
                now = time.perf_counter()
                if now - told > 1 and done < len(files):
                    told = now
                    state = list_html(names, reasons, done, len(files), now - start)
                    yield state, shown, gr.skip()
            state = list_html(names, reasons, len(files), len(files), time.perf_counter() - start)
            yield state, shown, write_downloads(self.folder, records)
        except InputError as error:
            yield page.problem(error), gr.skip(), gr.skip()
        except Stopped:
            yield page.problem("stopped"), gr.skip(), gr.skip()

    # ------------------------------------------------------------------------------- for programs

    def api_caption(self, photo, words, only, ban, topk, do_sample, num_beams,
                    num_return_sequences, temperature, top_p, lm_weight, seed):
        dials = (topk, do_sample, num_beams, num_return_sequences, temperature, top_p, lm_weight,
                 seed)

        def made():
            if not photo:
                raise InputError("a caption needs an image")
            self.folder.sweep()
            return self.studio.caption(photo, as_words(words, only, ban), dict(zip(DIALS, dials)))

        result, seconds = for_clients(made)
        return {**result._asdict(), "seconds": seconds}

    def api_search(self, text, photo, words, only, ban):
        def found():
            if not photo:
                raise InputError("a search needs an image")
            return self.studio.search(photo, text, as_words(words, only, ban))
        return for_clients(found)

    def api_story(self, text):
        def told():
            lines = lines_of(text)
            if len(lines) != 1:
                raise InputError("give one caption to continue")
            with self.studio.turn(None):
                return self.story(lines[0])
        return for_clients(told)
