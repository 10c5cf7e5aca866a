# demo.sh and test.sh source this file. It makes .venv where it is missing or out of date, and
# activates it.
if ! cmp -s requirements.txt .venv/requirements.txt; then
    python3 -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/requirements.txt  # last: marks a complete installation
fi
. .venv/bin/activate
