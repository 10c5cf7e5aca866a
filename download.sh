#!/usr/bin/env bash
# Downloads COCO 2017, captions and images, or the original project's checkpoint and cache. It
# needs curl and python3, and no root.
#
#   ./download.sh                                        # all of COCO, to coco/
#   ./download.sh --datadir /data/coco --parts annotations,val
#   ./download.sh --original                             # only the published weights, to original/
#
#   --datadir DIR   folder for COCO (default: coco)
#   --parts LIST    any of annotations (0.25 GB), val (0.8 GB), train (19 GB), separated by commas;
#                   "" for none (default: annotations,val,train; with --original none)
#   --original      the original project's checkpoint and cache (about 2.1 GB), as checkpoint.ckpt,
#                   cache.txt and cache.npy in original/, where sampler.py finds them; SOURCE.txt
#                   beside them records their source
#   --cache         only its cache, from CACHE_URL, as DIR/postcache.txt and DIR/postcache.npy
#   --help          this text
#
# It makes DIR/annotations/captions_{train,val}2017.json, DIR/train2017/*.jpg and DIR/val2017/*.jpg.
# Stop it at any time: the next run resumes, and does not download existing files again.
# While a zip is unpacked, both it and its files are on the disk: train needs 40 GB free.
# CACHE_URL names another folder with the original's files (default:
# https://the-eye.eu/public/AI/models/antarctic-captions).
# COCO_URL names a mirror (default: http://images.cocodataset.org).

set -euo pipefail

die() { echo "download.sh: $1" >&2; exit "${2:-1}"; }

dir=coco parts=default cache= original=
while [ $# -gt 0 ]; do
    case $1 in
        --datadir|--parts)
            if [ $# -lt 2 ] || [[ $2 == --* ]]; then die "$1 needs a value (see --help)." 2; fi
            if [ "$1" = --parts ]; then parts=$2; else dir=$2; fi
            shift 2 ;;
        --cache) cache=yes; shift ;;
        --original) original=yes; shift ;;
        --help|-h) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit ;;
        *) die "unknown argument $1 (see --help)." 2 ;;
    esac
done

if [ "$parts" = default ]; then
    if [ "$original" ]; then parts=; else parts=annotations,val,train; fi
fi

# All arguments are checked before the first download.
for part in ${parts//,/ }; do
    case $part in
        annotations|val|train) ;;
        *) die "unknown part $part: choose from annotations,val,train." 2 ;;
    esac
done
if [ "$cache" ] && [ -z "${CACHE_URL:-}" ]; then
    why="the address of the folder with postcache.txt and postcache.npy"
    die "--cache needs the environment variable CACHE_URL, $why." 2
fi
for tool in curl python3; do
    command -v $tool >/dev/null || die "$tool is needed and was not found."
done
if [ "$parts$cache" ]; then
    if ! mkdir -p -- "$dir" 2>/dev/null || ! [ -w "$dir" ]; then
        die "cannot write to the folder $dir (--datadir)."
    fi
    dir=$(CDPATH='' cd -- "$dir" && pwd)  # absolute, so that no name below starts with a dash
fi
if [ "$original" ] && { ! mkdir -p original 2>/dev/null || ! [ -w original ]; }; then
    die "cannot write to the folder original."
fi

size() { if [ -e "$1" ]; then wc -c <"$1"; else echo 0; fi; }

agent= hint=  # get_published sets the user agent, and a hint for messages of failed downloads

# fetch URL FILE: downloads to FILE.part and renames it, so that FILE is always whole.
fetch() {
    local url=$1 file=$2 best left=5 now status rc
    echo "Downloading $url"
    best=$(size "$file.part")
    while true; do
        rc=0
        # curl's own retries are for a server that is away or busy. After a cut they would discard
        # the bytes that came before it, so this loop starts a new curl, which resumes behind them.
        status=$(curl --fail --location --retry 3 --connect-timeout 30 --speed-limit 1 \
            --speed-time 60 --progress-bar -C - ${agent:+--user-agent "$agent"} --globoff \
            --write-out '%{http_code}' --output "$file.part" --url "$url") || rc=$?
        # 416 means that no bytes are left to send: the part is whole, whatever exit code this
        # version of curl gives.
        if [ $rc = 0 ] || [ "$status" = 416 ]; then mv "$file.part" "$file"; return; fi
        case $rc in
            33) rm -f "$file.part" ;;           # the server has no Range: start again
            16|18|28|52|55|56|92) ;;            # the connection was cut or stalled
            23) die "cannot write $file.part (is the disk full?): make room and run again." ;;
            *) die "cannot download $url (curl error $rc, HTTP status $status)$hint." ;;
        esac
        # The loop gives up after five tries that add no byte.
        now=$(size "$file.part")
        if [ "$now" -gt "$best" ]; then
            best=$now left=5
        else
            left=$((left - 1))
            [ $left -gt 0 ] ||
                die "the download of $url breaks off repeatedly: run again later to resume."
            [ $rc = 33 ] || sleep 2
        fi
    done
}

# unpack ZIP DIR FOLDER: checks all of ZIP, then puts its FOLDER in DIR. If it fails, it prints the
# reason, with exit code 3 if the zip is to blame.
unpack() {
    python3 - "$@" <<'EOF'
# zlib is imported so that a Python without it fails here, and not as if the zip were damaged.
import os, shutil, sys, zipfile, zlib

path, target, folder = sys.argv[1:]

def stop(why, code=3):
    print(why)
    sys.exit(code)

try:
    archive = zipfile.ZipFile(path)
    bad = archive.testzip()  # reads every member and compares its checksum
except Exception as error:  # BadZipFile, zlib.error, EOFError, NotImplementedError, ...
    stop(f"is damaged ({error})")
if bad:
    stop(f"is damaged (at {bad})")
names = archive.namelist()
for name in names:
    plain = name.replace("\\", "/")
    if plain.startswith("/") or ".." in plain.split("/"):
        stop(f"has a member that points outside its folder ({name})")
if folder == "annotations":
    whole = {f"annotations/captions_{split}2017.json" for split in ("train", "val")} <= set(names)
else:
    whole = any(name.startswith(folder + "/") and name.endswith(".jpg") for name in names)
if not whole:
    stop(f"does not hold the files of {folder}")

# The folder gets its own name at the end, so that a folder of that name is whole.
beside = os.path.join(target, folder + ".unpacking")
shutil.rmtree(beside, ignore_errors=True)  # left by a killed run
try:
    archive.extractall(beside, [name for name in names if name.startswith(folder + "/")])
    os.rename(os.path.join(beside, folder), os.path.join(target, folder))
except OSError as error:  # such as a full disk: the zip is good and stays
    stop(str(error), 4)
finally:
    shutil.rmtree(beside, ignore_errors=True)
EOF
}

# have FOLDER: whether its files exist.
have() {
    local file
    if [ "$1" = annotations ]; then
        [ -e "$dir/annotations/captions_train2017.json" ] &&
            [ -e "$dir/annotations/captions_val2017.json" ]
    else
        for file in "$dir/$1"/*.jpg; do [ -e "$file" ]; return; done  # only the first
    fi
}

get_part() {
    local folder=${1}2017 url zip why rc=0
    url=${COCO_URL:-http://images.cocodataset.org}
    url=${url%/}/zips/$folder.zip
    if [ "$1" = annotations ]; then
        folder=annotations url=${url%/zips/*}/annotations/annotations_trainval2017.zip
    fi
    zip=$dir/${url##*/}
    if have "$folder"; then echo "$dir/$folder exists: nothing to do."; return; fi
    if [ -e "$dir/$folder" ] && ! rmdir "$dir/$folder" 2>/dev/null; then
        die "$dir/$folder exists but lacks files of COCO 2017: move it away and run again."
    fi
    [ -e "$zip" ] || fetch "$url" "$zip"
    echo "Checking and unpacking $zip"
    why=$(unpack "$zip" "$dir" "$folder") || rc=$?
    case $rc in
        0) rm -f "$zip"; echo "$dir/$folder is ready." ;;
        3) rm -f "$zip"; die "$zip $why: it was deleted; run again to download it again." ;;
        *) die "$zip could not be unpacked${why:+ ($why)}: it was kept." ;;
    esac
}

# announced URL: prints the file's size in bytes, or nothing where the server does not say it. Where
# the file is not available, it prints the reason, with exit code 1.
announced() {
    local url=$1 rc=0 head status size kind
    head=$(curl --head --silent --location --retry 2 --connect-timeout 30 --max-time 120 \
        ${agent:+--user-agent "$agent"} --globoff --url "$url") || rc=$?
    case $rc in
        0) ;;
        6) echo "its host is unknown, or there is no network"; return 1 ;;
        7) echo "its host refuses the connection"; return 1 ;;
        28) echo "its host does not answer"; return 1 ;;
        *) echo "curl error $rc"; return 1 ;;
    esac
    # Of several answers the last counts: the others are redirections and earlier tries.
    read -r status size kind < <(tr -d '\r' <<<"$head" | awk '
        /^HTTP\// { status = $2; size = kind = "-" }
        tolower($1) == "content-length:" { size = $2 }
        tolower($1) == "content-type:" { kind = tolower($2) }
        END { print status, size, kind }')
    case $status in
        405|501) return ;;  # the server has no HEAD: the download itself will show it
        2??) ;;
        *) echo "HTTP status $status"; return 1 ;;
    esac
    case $kind in text/html*) echo "the server sends a web page instead"; return 1 ;; esac
    [ "$size" = - ] || echo "$size"
}

# human BYTES: prints a size in MB or GB.
human() {
    awk -v n="$1" 'BEGIN { if (n < 1e9) printf "%.1f MB", n / 1e6; else printf "%.2f GB", n / 1e9 }'
}

# place FOLDER ADDRESS NOTE NAME=FILE...: checks each FILE.download and renames it to FILE, or
# deletes it and prints the reason. It loads no pickle. NOTE is a file in FOLDER that gets a line
# for each file, unless it is "".
place() {
    python3 - "$@" <<'EOF'
import ast, hashlib, os, re, signal, struct, sys, time, zipfile
signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: without a traceback

folder, address, note = sys.argv[1:4]
names = dict(pair.rsplit("=", 1)[::-1] for pair in sys.argv[4:])  # {file: its published name}
address = re.sub("//[^/@]*@", "//", address)  # without a password

class Bad(Exception):
    """The reason why a file cannot be used (why), and the files that may be to blame."""
    def __init__(self, why, *files):
        self.why, self.files = why, files

def path_of(file):
    path = os.path.join(folder, file)
    return path + ".download" if os.path.exists(path + ".download") else path

def lines_of(file):
    """The number of entries in a cache's text, as antarctic/cache.py counts them."""
    with open(path_of(file), "rb") as stream:
        data = stream.read()
    if data.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        raise Bad("is a web page", file)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise Bad("is not UTF-8 text", file)
    text = text[:-1] if text.endswith("\n") else text
    return text.count("\n") + 1 if text else 0

def rows_of(file):
    """The number of rows of an .npy, which must hold real numbers and have its header's size."""
    with open(path_of(file), "rb") as stream:
        magic, sizes = stream.read(8), {b"\x93NUMPY\1\0": "<H", b"\x93NUMPY\2\0": "<I"}
        if magic not in sizes:
            raise Bad("is not a NumPy array", file)
        try:
            length, = struct.unpack(sizes[magic], stream.read(struct.calcsize(sizes[magic])))
            header = ast.literal_eval(stream.read(min(length, 10000)).decode("latin1").strip())
            kind, (rows, dim), fortran = header["descr"], header["shape"], header["fortran_order"]
            whole = rows > 0 and dim > 0 and fortran is False and re.match("[<>=]f[248]$", kind)
        except (ValueError, SyntaxError, LookupError, TypeError, struct.error, MemoryError,
                RecursionError):
            whole = False
        if not whole:
            raise Bad("is not an array with a row of real numbers for each entry", file)
        if os.path.getsize(path_of(file)) != stream.tell() + rows * dim * int(kind[2]):
            raise Bad("does not have the size that its header says", file)
    return rows

def check_cache(text, array):
    lines, rows = lines_of(text), rows_of(array)
    if lines != rows:
        raise Bad("has %d rows, but %s has %d lines" % (rows, names[text], lines), array, text)

def check_checkpoint(file):
    """Raises Bad for a file that torch.save did not write.

    Such a file is a zip of uncompressed members with right checksums and one pickle, which is not
    loaded.
    """
    try:
        with zipfile.ZipFile(path_of(file)) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise Bad("is not a PyTorch checkpoint (it is compressed)", file)
            pickles = [name for name in archive.namelist() if re.match("[^/]+/data.pkl$", name)]
            if len(pickles) != 1:
                raise Bad("is not a PyTorch checkpoint (it has no data.pkl)", file)
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, struct.error) as error:
        raise Bad("is damaged, or not a PyTorch checkpoint (%s)" % error, file)
    if bad:
        raise Bad("is damaged (at %s)" % bad, file)

def describe(file):
    """The line of the note for a file."""
    digest, path = hashlib.sha256(), path_of(file)
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    day = time.strftime("%Y-%m-%d", time.gmtime())
    return "%s: %s/%s, %d bytes, downloaded %s, sha256 %s\n" % (
        file, address, names[file], os.path.getsize(path), day, digest.hexdigest())

waiting = [file for file in names if path_of(file).endswith(".download")]
try:
    if any(not file.endswith(".ckpt") for file in waiting):
        check_cache(*list(names)[:2])
    for file in waiting:
        if file.endswith(".ckpt"):
            check_checkpoint(file)
except Bad as bad:
    deleted = [file for file in bad.files if file in waiting]
    for file in deleted:
        os.remove(path_of(file))
    advice = "it was deleted; run again to download it again"
    if not deleted:
        advice = "move %s away and run again" % path_of(bad.files[0])
    print("%s/%s %s: %s" % (address, names[bad.files[0]], bad.why, advice))
    sys.exit(3)
try:
    if note and waiting:
        note, lines = os.path.join(folder, note), []
        if os.path.exists(note):
            with open(note, encoding="utf-8") as stream:
                lines = [line for line in stream if line.split(":")[0] not in waiting]
        with open(note + ".new", "w", encoding="utf-8") as stream:
            stream.writelines(lines + [describe(file) for file in waiting])
        os.replace(note + ".new", note)
    for file in waiting:
        os.replace(path_of(file), os.path.join(folder, file))
except OSError as error:
    print("cannot write to %s (%s)" % (folder, error.strerror))
    sys.exit(4)
EOF
}

# get_published FOLDER CACHE NOTE [CHECKPOINT]: downloads the original's files, as CACHE.txt,
# CACHE.npy and CHECKPOINT.
get_published() {
    local folder=$1 note=$3 address i file why needed=0 free
    local files=("$2.txt" "$2.npy" ${4:+"$4"})
    local names=(postcache.txt postcache.npy ${4:+"-epoch=05-vloss=2.163.ckpt"})
    local sizes=() pairs=()
    address=${CACHE_URL:-https://the-eye.eu/public/AI/models/antarctic-captions}
    address=${address%/}
    agent=eye02  # the original's README asks for it
    hint=": CACHE_URL can name another folder with the file; without it, train your own weights"
    hint+=" (README.md, \"Train on COCO\"), or run the method with ./demo.sh"

    # It asks for the sizes of all files before the first download.
    for i in "${!files[@]}"; do
        file=$folder/${files[i]}
        pairs+=("${names[i]}=${files[i]}")
        if [ -e "$file" ]; then echo "$file exists: nothing to do."; continue; fi
        why=$(announced "$address/${names[i]}") ||
            die "cannot download $address/${names[i]} ($why)$hint."
        sizes[i]=$why
        if [[ $why == *[!0-9]* ]]; then sizes[i]=; fi
        needed=$((needed + ${sizes[i]:-0}))
    done
    [ ${#sizes[@]} -gt 0 ] || return 0
    why="$(human "$needed")"
    [ "$needed" -gt 0 ] || why="the server does not say their size"
    echo "Downloading the original project's files ($why) from $address to $folder/"
    for file in "${files[@]/#/$folder/}"; do
        needed=$((needed - $(size "$file.download") - $(size "$file.download.part")))
    done
    free=$(df -Pk "$folder" | awk 'NR == 2 { print $4 }')
    if [ "$free" ] && [ "$needed" -gt $((free * 1024)) ]; then
        free=$(human $((free * 1024)))
        die "$folder has $free free, but needs $(human "$needed"): make room and run again."
    fi

    for i in "${!files[@]}"; do
        file=$folder/${files[i]}
        if ! [ -e "$file" ]; then
            [ -e "$file.download" ] || fetch "$address/${names[i]}" "$file.download"
            if [ "${sizes[i]}" ] && [ "$(size "$file.download")" -ne "${sizes[i]}" ]; then
                why="$(size "$file.download") bytes instead of ${sizes[i]}: it was deleted"
                rm -f "$file.download"
                die "$address/${names[i]} came with $why; run again to download it again."
            fi
        fi
        [[ $file != *.txt ]] || continue  # it is checked and renamed together with its array
        why=$(place "$folder" "$address" "$note" "${pairs[@]}") ||
            die "${why:-the files in $folder could not be checked}."
    done
    for i in "${!files[@]}"; do
        [ -z "${sizes[i]+new}" ] || echo "$folder/${files[i]} is ready."
    done
}

for part in ${parts//,/ }; do get_part "$part"; done
if [ "$cache" ]; then get_published "$dir" postcache ""; fi
if [ "$original" ]; then get_published "$PWD/original" cache SOURCE.txt checkpoint.ckpt; fi
