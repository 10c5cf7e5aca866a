"""Words as Unicode sees them: what --ban and --only match, and entries that look wrong."""

import re
import sys
from functools import cache
from unicodedata import category, normalize

import ahocorasick

from antarctic.distributed import warn
from antarctic.errors import InputError

START, END = "\1", "\2"  # where a word may begin and end
# Soft hyphens and variation selectors change how other characters look, not which word is there.
CLEANED = dict.fromkeys([0xAD, *range(0xFE00, 0xFE10)]) | {ord(START): " ", ord(END): " "}


def fold(text):
    """A text in the form in which equal words are equal.

    Case and white space do not count, and a letter with its marks is the same composed and
    decomposed (Unicode's canonical caseless matching, chapter 3.13 of its standard).
    """
    text = normalize("NFD", normalize("NFD", text.translate(CLEANED)).casefold())
    return " ".join(text.split())


@cache
def boundaries():
    """Two patterns, of the places in a text where a word may begin and where it may end, which gets
    the marks of the first before.

    Words are of letters, digits and _. Combining marks belong to their letter, and so do the
    joiners of Arabic and Indic scripts.
    """
    marks = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if category(c)[0] == "M")
    word = rf"[\w{marks}\u200c\u200d]"
    return (re.compile(f"(?<!{word})"),
            re.compile(f"(?<!{START})(?={START}?(?:(?!{word}|{START}).|$))", re.DOTALL))


def with_boundaries(text):
    """A folded text with marks where a word may begin and end. So a text holds another one as
    whole words if its marked form holds the marked form of the other one."""
    begins, ends = boundaries()
    return ends.sub(END, begins.sub(START, text))


class WholeWords:
    """Texts to be found in others as whole words, as fold() sees them.

    A search takes time in proportion to the length of the text, however many lines there are.
    Attributes: lines, the folded texts, sorted.
    """

    def __init__(self, lines):
        self.lines = sorted({fold(line) for line in lines} - {""})
        self.automaton = ahocorasick.Automaton(ahocorasick.STORE_LENGTH)
        for line in self.lines:
            self.automaton.add_word(with_boundaries(line).removeprefix(END).removesuffix(START))
        self.automaton.make_automaton()

    def search(self, text):
        """Whether a text holds any of the lines."""
        if not self.lines:
            return False
        return next(self.automaton.iter(with_boundaries(fold(text))), None) is not None


def restrict(entries, embeddings, only, banned):
    """The entries, and their Embeddings, that --only and --ban leave.

    only: a list of entries, or None; they are compared as fold() sees them. banned: a WholeWords,
    or None. Raises InputError where a line of --only is no entry, or no entry is left.
    """
    rows = range(len(entries))
    if only:
        folded = list(map(fold, entries))
        missing = {fold(line): line for line in only}
        wanted = set(missing)
        for text in folded:
            missing.pop(text, None)
        if missing:
            raise InputError(f'{len(missing)} lines of --only, such as "{min(missing.values())}", '
                             "are in no cache; compute_cache.py --add puts them into one")
        rows = [i for i in rows if folded[i] in wanted]
    if banned:
        rows = [i for i in rows if not banned.search(entries[i])]
    if not rows:
        raise InputError("--ban leaves no entry")
    return [entries[i] for i in rows], embeddings.only(rows)


# ------------------------------------------------------------------------- entries that look wrong

def warn_of_entries(entries, start=0):
    """Warns of entries with the table's separator in them, and of those that differ from another
    one in case or white space alone. The first `start` entries are known: none is named for its own
    sake."""
    barred = [entry for entry in entries[start:] if "|" in entry]
    if barred:
        warn(f'{len(barred):,} entries, such as "{barred[0]}", hold a |, which separates the '
             "entries of a table")
    # Most entries are in lower case, and are kept only once. So few texts are stored.
    unusual = {}
    for i, entry in enumerate(entries):
        key = " ".join(entry.casefold().split())
        if key != entry:
            unusual.setdefault(key, []).append(i)
    if not unusual:
        return
    for i, entry in enumerate(entries):
        if entry in unusual:
            unusual[entry].append(i)
    pairs = [sorted(set(rows)) for rows in unusual.values()]
    pairs = sorted((rows[-1], rows[0]) for rows in pairs if len(rows) > 1 and rows[-1] >= start)
    if pairs:
        later, earlier = pairs[0]
        warn(f'{len(pairs):,} entries, such as "{entries[earlier]}" and "{entries[later]}", differ '
             "only in case or white space")


def warn_of_long_entries(clip, entries, prefix=""):
    """Warns of entries that have more tokens, with the prefix, than CLIP reads. clip: a Clip."""
    # A token is at least a byte, and case and composition triple a text's bytes at most.
    bytes_needed = (clip.max_length - 2) / 3
    suspects = [entry for entry in entries if len((prefix + entry).encode()) > bytes_needed]
    long = []
    for start in range(0, len(suspects), 1024):
        part = suspects[start:start + 1024]
        tokens = clip.tokenizer([prefix + entry for entry in part])["input_ids"]
        long += [entry for entry, row in zip(part, tokens) if len(row) > clip.max_length]
    if long:
        entry = long[0] if len(long[0]) <= 100 else f"{long[0][:100]}..."
        warn(f'{len(long):,} entries, such as "{entry}", are longer than the {clip.max_length} '
             "tokens that CLIP reads; it sees only their beginnings")
