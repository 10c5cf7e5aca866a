"""Members of tar files: listed by their headers alone, read by their offset, never unpacked.

A member has a path such as `shards/00000.tar/000123.jpg`, which no file system knows: that of its
tar file and its name.
"""

import os
import re
import stat
import tarfile
import threading
from functools import lru_cache, partial
from typing import NamedTuple

from antarctic.errors import InputError
from antarctic.reads import persistent

# Only the parser of one header is tarfile's: its reader takes headers of any length, and keeps an
# object of a kilobyte for each member.
SUFFIX = ".tar"
BLOCK = 512
MOST_MEMBERS = 1_000_000  # of a tar file; about 200 bytes of memory each
MOST_HEADERS = 4 * MOST_MEMBERS  # some are folders, long names ...
LONGEST_HEADER = 1 << 16  # bytes of a long name or of pax attributes
LONGEST_NAME = 1024  # characters
INDEX_LOCK = threading.Lock()
KEPT_INDEXES = 4  # of the tar files that were read last
EXTRA_HEADERS = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE,
                 tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
SPARSE = "GNU.sparse."  # how pax attributes of sparse files begin


class Index(NamedTuple):
    members: dict  # {name: (offset, size)} of the whole regular files, in their order
    problems: list  # what is left out, and why: texts


class Header(NamedTuple):
    name: str
    size: int  # of its data
    reason: str | None  # why it cannot be read, if it cannot


# ------------------------------------------------------------------------------------------- paths

def split_path(path):
    """(the tar file, the member's name) of a member's path; None where no parent of the path is a
    tar file."""
    path = os.fspath(path)
    lower, at = path.lower(), -1
    while (at := lower.find(SUFFIX + os.sep, at + 1)) >= 0:
        tar = path[:at + len(SUFFIX)]
        if os.path.isfile(tar):  # and no folder of that name
            return tar, path[len(tar) + 1:].replace(os.sep, "/")
    return None


def is_file(path):
    """Whether a path is that of a file or of a tar file's member."""
    if os.path.isfile(path):
        return True
    try:
        return member_at(path) is not None
    except OSError:
        return False


def member_at(path):
    """(tar file, its os.stat_result, offset, size) of a member's path; None where the path is none
    of a tar file's. Raises OSError where the tar file has no such member or cannot be read."""
    split = split_path(path)
    if split is None:
        return None
    tar, name = split
    status = os.stat(tar)
    try:
        members = read_index(tar).members
    except InputError as error:  # of its bytes; errors of the system stay as they are
        raise OSError(str(error)) from error
    if name not in members:
        raise FileNotFoundError(f"there is no such member in {tar}")
    return tar, status, *members[name]


def read_member(file, offset, size):
    """The bytes of a member of an open tar file. Raises OSError where the file is shorter."""
    file.seek(offset)
    data = file.read(size)
    if len(data) < size:
        raise OSError("the tar file is cut off")
    return data


# ------------------------------------------------------------------------------------------- index

def index_of(path):
    """The Index of a tar file. It is made once as long as the file stays as it is and no more than
    KEPT_INDEXES others are read. Raises InputError where the file is no uncompressed tar file, or
    has too many members."""
    try:
        return persistent(partial(read_index, path))
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror or error})") from error


def read_index(path):
    """index_of, which raises OSError where the file cannot be read."""
    path = os.fspath(path)
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is no regular file")
    with INDEX_LOCK:  # threads that read one tar file make its index once
        return make_index(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=KEPT_INDEXES)
def make_index(path, length, mtime_ns):
    """The Index of a tar file of `length` bytes, which was changed at mtime_ns."""
    members, left_out, end = {}, [], None  # left_out: (name, reason)
    with open(path, "rb") as file:
        try:
            for header, offset in walk(file, length):
                if header.reason:
                    left_out.append((header.name, header.reason))
                elif offset + header.size > length:
                    end = f"{path} is cut off: {header.name!r} and what followed are left out"
                    break
                elif header.name in members:
                    left_out.append((header.name, "two members have this name"))
                else:
                    members[header.name] = offset, header.size
                if len(members) + len(left_out) > MOST_MEMBERS:
                    raise InputError(f"{path} has more than {MOST_MEMBERS:,} members")
        except tarfile.HeaderError as error:
            end = f"{path} is damaged or cut off ({error}): what followed {len(members):,} members"
            end += " is left out"
    if not members:
        reason = "it is compressed" if is_compressed(path) else end or "it has no members"
        raise InputError(f"{path} is no uncompressed tar file that holds files ({reason})")
    problems = []
    if left_out:
        name, reason = left_out[0]
        problems.append(f"{path} has members that are not read: {len(left_out):,}, such as "
                        f"{name!r} ({reason})")
    return Index(members, [*problems, *[end] * (end is not None)])


def is_compressed(path):
    with open(path, "rb") as file:
        return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"))


def walk(file, length):
    """Yields (Header, offset of its data) for each file of a tar of `length` bytes, and for what
    cannot be read.

    Raises tarfile.HeaderError where a header is damaged or cut off, and InputError where there are
    too many. Folders have no data, and are passed over.
    """
    at, attributes = 0, {}  # what extra headers say of the next member
    for _ in range(MOST_HEADERS):
        file.seek(at)
        block = file.read(BLOCK)
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.EmptyHeaderError, tarfile.EOFHeaderError) as error:
            if at > length:
                raise tarfile.TruncatedHeaderError("truncated header") from error
            return
        if info.type in EXTRA_HEADERS:
            attributes |= extra_attributes(file, info)
            at += BLOCK + padded(info.size)
            continue
        if info.type == tarfile.GNUTYPE_SPARSE:
            skip_sparse(file, block)
            attributes[SPARSE] = True
        at, size = file.tell(), attributes.get("size", info.size)
        end = at + padded(size)
        if not info.isdir():
            yield header_of(info, attributes, size), at
        if info.isreg() or info.type not in tarfile.SUPPORTED_TYPES:
            at = end
        attributes = {}
    raise InputError(f"{file.name} has more than {MOST_HEADERS:,} headers")


def padded(size):
    """The bytes that a tar file spends on `size` bytes of data."""
    if not 0 <= size < 1 << 60:
        raise tarfile.InvalidHeaderError("impossible size")
    return -(-size // BLOCK) * BLOCK


def read_header(file, size):
    data = file.read(size)
    if len(data) < size:
        raise tarfile.TruncatedHeaderError("truncated header")
    return data


def skip_sparse(file, block):
    """Reads to the end of the headers of GNU's sparse file. block: the first of them."""
    more = block[482]
    for _ in range(LONGEST_HEADER // BLOCK):
        if not more:
            return
        more = read_header(file, BLOCK)[504]
    raise tarfile.InvalidHeaderError("bad sparse header")


def extra_attributes(file, info):
    """{key: value} of what an extra header says of the next member: path as bytes, size as int,
    SPARSE, and "reason" where the member cannot be read."""
    if info.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):  # of all members; of links
        return {}
    if info.size > LONGEST_HEADER:
        return {"reason": "its header is too long"}
    data = read_header(file, max(0, info.size))
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.partition(b"\0")[0]}
    return pax_attributes(data)


def pax_attributes(data):
    """{key: value} of a pax header: path as bytes, size as int, and those of sparse files. Raises
    tarfile.HeaderError where it is none."""
    attributes = {}
    while data.strip(b"\0"):
        digits = data[:20].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        record, data = data[:length], data[length:]
        key, equals, value = record[len(digits) + 1:-1].partition(b"=")
        if not equals or not record.endswith(b"\n"):
            raise tarfile.InvalidHeaderError("bad pax header")
        if key == b"path":
            attributes["path"] = value
        elif key == b"size":
            if not value.isdigit() or len(value) > 20:
                raise tarfile.InvalidHeaderError("bad pax header")
            attributes["size"] = int(value)
        elif key.startswith(SPARSE.encode()):
            attributes[SPARSE] = True
    return attributes


def header_of(info, attributes, size):
    """The Header of a member, whose name is a relative path without "." or "//"."""
    name = info.name
    if "path" in attributes:
        name = attributes["path"].decode("utf-8", "surrogateescape")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    checks = (
        (not info.isreg(), "it is a link, a device or the like"),
        (SPARSE in attributes, "it is sparse"),
        (name.startswith("/") or ".." in parts or not parts,
         "its name is no path inside the tar file"),
        (len(name) > LONGEST_NAME or "\0" in name, "its name is too long or holds a NUL"),
        (not name.isascii() and re.search("[\ud800-\udfff]", name), "its name is not UTF-8"))
    reason = attributes.get("reason")
    for failed, why in checks:
        reason = reason or (why if failed else None)
    return Header("/".join(parts)[:LONGEST_NAME], size, reason)
