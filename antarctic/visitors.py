"""What a visitor of the page gives, checked: words and dials; and what was computed for these last.
"""

import threading
from collections import OrderedDict
from typing import NamedTuple

from antarctic.errors import InputError
from antarctic.texts import one_line

MOST_WORDS, LONGEST_WORD = 1000, 200  # lines of a box; characters of a line
# The least and the greatest value of each dial. An image must not keep the others waiting for long.
BOUNDS = {"topk": (1, 100), "num_beams": (1, 16), "num_return_sequences": (1, 1000),
          "temperature": (0.05, 5), "top_p": (0.01, 1), "lm_weight": (0, 5),
          "seed": (-2**53, 2**53)}


class Words(NamedTuple):
    """A visitor's vocabulary: three tuples of lines, and one of OwnNames."""

    words: tuple = ()  # entries that lie over the cache
    only: tuple = ()  # the only entries
    ban: tuple = ()  # what no entry and no caption may hold
    own_names: tuple = ()  # names from photos: classroom.OwnNames


AS_IT_IS = Words()


def lines_of(text):
    """The distinct lines of a box, a tuple. Raises InputError where they are too many, or one is
    too long."""
    lines = [line for line in str(text or "").splitlines() if line.strip()]
    if len(lines) > MOST_WORDS:
        raise InputError(f"a box takes {MOST_WORDS:,} lines, not {len(lines):,}; "
                         f"compute_cache.py --entries makes a cache of more")
    return tuple(dict.fromkeys(one_line(line, "the box", LONGEST_WORD) for line in lines))


def checked_dials(dials):
    """The dials as numbers within BOUNDS. Raises InputError."""
    checked = {}
    for name, value in dials.items():
        if name not in BOUNDS:
            checked[name] = bool(value)
            continue
        low, high = BOUNDS[name]
        number = value if isinstance(value, int | float) else low - 1  # an empty field is None
        if not low <= number <= high:  # nan is not
            raise InputError(f"{name} must be a number from {low:g} to {high:g}")
        checked[name] = number if name in ("temperature", "top_p", "lm_weight") else int(number)
    if not checked.get("do_sample"):
        beams = checked.get("num_beams", 1)
        checked["num_return_sequences"] = min(beams, checked.get("num_return_sequences", beams))
    return checked


class Recent(OrderedDict):
    """The values that were used last, at most `most` of them."""

    def __init__(self, most):
        super().__init__()
        self.most, self.lock = most, threading.Lock()

    def find(self, key, make):
        """The value of a key; make() computes it where it is not there."""
        with self.lock:
            if key in self:
                self.move_to_end(key)
                return self[key]
        value = make()
        with self.lock:
            self[key] = value
            while len(self) > self.most:
                self.popitem(last=False)
        return value
