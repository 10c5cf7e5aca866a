"""What a caption came from: the entries of its table that it uses, and its words that none says."""

import re
import unicodedata
from functools import cache, lru_cache

from antarctic.words import fold

# Words that name nothing in a picture. "two" and "front" are among them, since captions count and
# place things that entries name one by one. Words of other languages all count.
FUNCTION_WORDS = frozenset("""a an the this that these those some any all both each other another
    many few several one two three four five and or but not no of in on at to by for from with
    without near next beside behind under over above below into onto out up down off across along
    around through between front top side back its their his her it they he she who which where
    there while as is are was were be being been has have had do does s t image photo picture view
    scene group pair""".split())
IRREGULAR = {"men": "man", "women": "woman", "people": "person", "children": "child",
             "feet": "foot", "teeth": "tooth", "mice": "mouse", "geese": "goose"}
LONGEST_WORD = 100  # characters that count
ENDINGS = ((r"(?<=..)ies$", "y"), (r"(s|x|z|ch|sh)es$", r"\1"), (r"(?<=.[^su])s$", ""))
VERB = re.compile("(?=.*[aeiouy].*(?:ing|ed))(..+[^e])(?:ing|ed)")  # no "string", no "seed"
# Scripts without spaces, of which each letter counts as a word: Thai, Lao, Burmese, Khmer, Japanese
# and Chinese.
UNSPACED = (r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff"
            r"\uf900-\ufaff\U00020000-\U0003ffff")


@cache
def word_pattern():
    """A pattern of a word: letters, digits and _ with their combining marks, and the joiners of
    Arabic and Indic scripts."""
    # Characters above 0xFFFF would make the search in a set a hundred times slower.
    marks = "".join(c for c in map(chr, range(1 << 16)) if unicodedata.category(c)[0] == "M")
    # ++ keeps no way back, which would take gigabytes in a text of megabytes.
    return re.compile(rf"[{UNSPACED}][{marks}]*|(?:[^\W{UNSPACED}]|[{marks}\u200c\u200d])++")


def words_in_order(text):
    """The words of a text as fold() sees them, a list; of long ones the beginnings."""
    return [word[:LONGEST_WORD] for word in word_pattern().findall(fold(text))]


def words_of(text):
    """The words of words_in_order(), a set."""
    return set(words_in_order(text))


@lru_cache(1 << 16)
def stem(word):
    """A word without the endings of English plurals and verbs, so that "ponies" and "pony" have one
    stem, and "rides" and "riding". In the manner of Porter's (1980), but shorter."""
    word = IRREGULAR.get(word, word)
    for ending, replacement in ENDINGS:
        word, changed = re.subn(ending, replacement, word)
        if changed:
            break
    if verb := VERB.fullmatch(word):
        word = re.sub(r"([bdgmnprt])\1$", r"\1", verb[1])  # sitting, to sit
    word = re.sub("y$", "i", re.sub("(?<=..)e$", "", word))
    return re.sub("v$", "f", word)  # knives, a knife


def stems(text):
    return set(map(stem, words_of(text)))


def content(text):
    """The words of a text that name something, a set of stems."""
    return set(map(stem, words_of(text) - FUNCTION_WORDS))


def repeats(text):
    """How many content words of a text were said before in it: 2 in "a pizza, two pizzas and a
    pizza"."""
    words = [stem(word) for word in words_in_order(text) if word not in FUNCTION_WORDS]
    return len(words) - len(set(words))


def from_nowhere(caption, table):
    """The content words of a caption that no entry of its table says, a set of stems: where to look
    for what is not in the image. table: a list of (entry, cosine)."""
    return content(caption).difference(*(stems(entry) for entry, _ in table))


def cover(caption, table):
    """The share of a caption's content words that its table says, 0 to 1; None where it has none.
    table: a list of (entry, cosine)."""
    words = content(caption)
    return 1 - len(from_nowhere(caption, table)) / len(words) if words else None


def used_entries(caption, table):
    """The entries of a table all of whose words are in the caption. table: a list of (entry,
    cosine)."""
    said = stems(caption)
    return [entry for entry, _ in table if (own := stems(entry)) and own <= said]


def graded(table, caption):
    """The entries of a table as a list of (entry, cosine, whether its words are in the caption, how
    well it fits beside the others, from 0 to 1). table: a list of (entry, cosine)."""
    used, cosines = set(used_entries(caption, table)), [cosine for _, cosine in table]
    low, high = min(cosines, default=0), max(cosines, default=1)
    return [(entry, cosine, entry in used, (cosine - low) / (high - low or 1))
            for entry, cosine in table]


def pieces(text):
    """A text in pieces, which are words at the odd places and what stands between at the others."""
    return re.split(f"({word_pattern().pattern})", text)

