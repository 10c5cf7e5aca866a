#!/usr/bin/env bash
# Downloads COCO 2017: captions and images. It needs curl and python3, and no root.
#
#   ./download.sh                                        # all of it, to coco/
#   ./download.sh --datadir /data/coco --parts annotations,val
#   CACHE_URL=https://host/folder ./download.sh --parts "" --cache
#
#   --datadir DIR   where it goes (default: coco)
#   --parts LIST    any of annotations (0.25 GB), val (0.8 GB), train (19 GB), with commas between;
#                   "" for none (default: annotations,val,train)
#   --cache         also the original project's published cache, postcache.txt and postcache.npy, from CACHE_URL
#   --help          this text
#
# It makes DIR/annotations/captions_{train,val}2017.json, DIR/train2017/*.jpg and DIR/val2017/*.jpg.
# Stop it at any time: the next run goes on where this one stopped, and leaves alone what is there.
# A zip and its files stand side by side while it is unpacked: train needs 40 GB free for that time.
# COCO_URL names a mirror (default: http://images.cocodataset.org).

set -euo pipefail

die() { echo "download.sh: $1" >&2; exit "${2:-1}"; }

dir=coco parts=annotations,val,train cache=
while [ $# -gt 0 ]; do
    case $1 in
        --datadir|--parts)
            if [ $# -lt 2 ] || [[ $2 == --* ]]; then die "$1 needs a value (see --help)." 2; fi
            if [ "$1" = --parts ]; then parts=$2; else dir=$2; fi
            shift 2 ;;
        --cache) cache=yes; shift ;;
        --help|-h) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit ;;
        *) die "unknown argument $1 (see --help)." 2 ;;
    esac
done

# Everything that can be refused is refused before the first byte.
for part in ${parts//,/ }; do
    case $part in annotations|val|train) ;; *) die "unknown part $part: choose from annotations,val,train." 2 ;; esac
done
if [ "$cache" ] && [ -z "${CACHE_URL:-}" ]; then
    die "--cache needs the environment variable CACHE_URL, the address of the folder with postcache.txt and postcache.npy." 2
fi
for tool in curl python3; do command -v $tool >/dev/null || die "$tool is needed and was not found."; done
if ! mkdir -p -- "$dir" 2>/dev/null || ! [ -w "$dir" ]; then die "cannot write to the folder $dir (--datadir)."; fi
dir=$(CDPATH='' cd -- "$dir" && pwd)  # absolute, so that no name below starts with a dash

size() { if [ -e "$1" ]; then wc -c <"$1"; else echo 0; fi; }

# fetch URL FILE: to FILE.part first, so that FILE is always whole.
fetch() {
    local url=$1 file=$2 best left=5 now status rc
    echo "Downloading $url"
    best=$(size "$file.part")
    while true; do
        rc=0
        # curl's own retries are for a server that is away or busy. They would throw away the bytes that came before
        # a cut, so a cut is for the loop: a new curl goes on behind them.
        status=$(curl --fail --location --retry 3 --connect-timeout 30 --progress-bar -C - \
            --write-out '%{http_code}' --output "$file.part" "$url") || rc=$?
        # 416 means that no bytes are left to send: the part is whole, whatever this version of curl makes of it.
        if [ $rc = 0 ] || [ "$status" = 416 ]; then mv "$file.part" "$file"; return; fi
        case $rc in
            33) rm -f "$file.part" ;;           # no Range on this server: from the start
            16|18|28|52|55|56|92) ;;            # the connection was cut or stood still
            *) die "cannot download $url (curl error $rc, HTTP status $status)." ;;
        esac
        # Patience lasts as long as bytes come.
        now=$(size "$file.part")
        if [ "$now" -gt "$best" ]; then
            best=$now left=5
        else
            left=$((left - 1))
            [ $left -gt 0 ] || die "the download of $url breaks off again and again: run again later to go on."
            [ $rc = 33 ] || sleep 2
        fi
    done
}

# unpack ZIP DIR FOLDER: checks all of ZIP, then puts its FOLDER in DIR. Prints why not; exit code 3 blames the zip.
unpack() {
    python3 - "$@" <<'EOF'
import os, shutil, sys, zipfile, zlib  # zlib only so that a Python without it is not taken for a damaged zip

path, target, folder = sys.argv[1:]

def stop(why, code=3):
    print(why)
    sys.exit(code)

try:
    archive = zipfile.ZipFile(path)
    bad = archive.testzip()  # reads every member and compares its checksum
except Exception as error:  # broken bytes raise all kinds: BadZipFile, zlib.error, EOFError, NotImplementedError
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

# Renamed at the end, so that a folder under its own name is a whole one.
beside = os.path.join(target, folder + ".unpacking")
shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed
try:
    archive.extractall(beside, [name for name in names if name.startswith(folder + "/")])
    os.rename(os.path.join(beside, folder), os.path.join(target, folder))
except OSError as error:  # a full disk, for one: the zip is good and stays
    stop(str(error), 4)
finally:
    shutil.rmtree(beside, ignore_errors=True)
EOF
}

# have FOLDER: whether its files are there.
have() {
    local file
    if [ "$1" = annotations ]; then
        [ -e "$dir/annotations/captions_train2017.json" ] && [ -e "$dir/annotations/captions_val2017.json" ]
    else
        for file in "$dir/$1"/*.jpg; do [ -e "$file" ]; return; done  # the first one tells
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
    if have "$folder"; then echo "$dir/$folder is there: nothing to do."; return; fi
    if [ -e "$dir/$folder" ] && ! rmdir "$dir/$folder" 2>/dev/null; then
        die "$dir/$folder is there but lacks files of COCO 2017: move it away and run again."
    fi
    [ -e "$zip" ] || fetch "$url" "$zip"
    echo "Checking and unpacking $zip"
    why=$(unpack "$zip" "$dir" "$folder") || rc=$?
    case $rc in
        0) rm -f "$zip"; echo "$dir/$folder is ready." ;;
        3) rm -f "$zip"; die "$zip $why: it was deleted, and a new run downloads it afresh." ;;
        *) die "$zip could not be unpacked${why:+ ($why)}: it was kept." ;;
    esac
}

get_cache() {
    local file=$dir/$1
    if [ -e "$file" ]; then echo "$file is there: nothing to do."; return; fi
    fetch "${CACHE_URL%/}/$1" "$file"
    # A host that has lost the file may answer with a web page and a good status.
    if [[ $1 == *.npy ]] && [ "$(head -c 6 "$file" | tail -c 5)" != NUMPY ]; then
        rm -f "$file"
        die "$CACHE_URL/$1 is no array of numpy: it was deleted."
    fi
    echo "$file is ready."
}

for part in ${parts//,/ }; do get_part "$part"; done
if [ "$cache" ]; then get_cache postcache.txt; get_cache postcache.npy; fi
