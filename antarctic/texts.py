"""Text files that are read with bounds."""

from antarctic.bounded import MOST_TEXT, parse_json, read_bytes
from antarctic.errors import InputError

MOST_LINES = 1 << 27  # of a text; a list of them takes 8 bytes for each empty one
LONGEST_TEXT = 10_000  # characters of an entry or a caption; the models read at most 128 tokens


def read_text(path, kind, most=MOST_TEXT):
    """A UTF-8 text file, without the byte order mark that editors on Windows write.

    kind: what the file is, for messages. Raises InputError where it is missing, no regular file,
    not UTF-8, or has more than `most` bytes.
    """
    try:
        return read_bytes(path, kind, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"the {kind} {path} is not UTF-8 text") from error


def read_json(path, kind, most=MOST_TEXT, **options):
    """The value of a JSON file. options: of json.loads. Raises InputError as read_text and
    parse_json do, and what json.loads raises."""
    return parse_json(read_text(path, kind, most), path, kind, **options)


def split_lines(text, path):
    """The lines of a text of the file path, a list. Raises InputError where they are too many."""
    if text.count("\n") > MOST_LINES:
        raise InputError(f"{path} has more than {MOST_LINES:,} lines")
    return text.split("\n")


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
    lines = split_lines(read_text(path, kind), path)
    return [one_line(line, path, most) for line in lines if line.strip()]


def read_words(path):
    """The lines of a list of words, see read_lines. Raises InputError where there is none."""
    words = read_lines(path, "list of words")
    if not words:
        raise InputError(f"there is no word in {path}")
    return words
