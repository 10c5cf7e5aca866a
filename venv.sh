# Sourced by demo.sh and test.sh: makes .venv where it is missing or out of date, and steps into it.
if ! cmp -s requirements.txt .venv/requirements.txt; then
    python3 -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/requirements.txt  # last: says that the installation is whole
fi
. .venv/bin/activate
