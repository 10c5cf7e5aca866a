#!/usr/bin/env bash
# Runs the tests in .venv, which is made where it is missing. Arguments go to pytest: ./test.sh tests/test_utils.py -k search
set -euo pipefail
cd "$(dirname "$0")"
. ./venv.sh
export HF_HUB_OFFLINE=1
exec python -m pytest -q "$@"
