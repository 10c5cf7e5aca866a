"""Text files that are read with bounds."""

from functools import partial

from antarctic.errors import InputError
from antarctic.files import reason_of
from antarctic.reads import persistent, read_regular

MOST_BYTES = 1 << 31  # of a text file, which is read whole
LONGEST_TEXT = 10_000  # characters of an entry or a caption; the models read at most 128 tokens


def read_text(path, kind):
    """A UTF-8 text file, without the byte order mark that editors on Windows write. It is opened
    once.

    kind: what the file is, for messages. Raises InputError where it is missing, cannot be read, is
    no regular file, has more than MOST_BYTES, or is not UTF-8.
    """
    try:
        return read_file(path, kind).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"the {kind} {path} is not UTF-8 text") from error


def read_file(path, kind):
    """The bytes of a file, see read_text."""
    try:
        return persistent(partial(read_regular, path, MOST_BYTES))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"there is no {kind} at {path}") from error
    except OSError as error:
        raise InputError(f"cannot read the {kind} {path} ({reason_of(error)})") from error
    except ValueError as error:  # a NUL in its name
        raise InputError(f"there is no {kind} at {path}") from error


def one_line(text, path, most=LONGEST_TEXT):
    """A text of the file path with each run of white space as one space, fit for a tokenizer.

    Raises InputError where it has more than `most` characters, for which tokenizers would take
    minutes and gigabytes, and AttributeError where it is not a string.
    """
    text = " ".join(text.split())
    if len(text) > most:
        raise InputError(f"{path} holds a text of {len(text):,} characters ({text[:40]!r}...); "
                         f"{most:,} are read at most")
    if text.isascii():
        return text
    return text.encode(errors="replace").decode()  # JSON can hold half a surrogate pair


def read_lines(path, kind, most=LONGEST_TEXT):
    """The lines of a text file that are not blank, as one_line returns them.

    kind: what the file is, for messages. Raises InputError as read_text and one_line do.
    """
    lines = read_text(path, kind).split("\n")
    return [one_line(line, path, most) for line in lines if line.strip()]


def read_words(path):
    """The lines of a list of words, see read_lines. Raises InputError where there is none."""
    words = read_lines(path, "list of words")
    if not words:
        raise InputError(f"there is no word in {path}")
    return words
