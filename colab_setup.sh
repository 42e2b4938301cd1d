#!/usr/bin/env bash
# Install brainage_nb on Colab, Kaggle or locally without touching the torch, torchvision and numpy that are there.
# Safe to run twice. BRAINAGE_SOURCE may name another place to install from (a folder, a wheel, a git address).
set -euo pipefail

PYTHON=${PYTHON:-python3}
SOURCE=${BRAINAGE_SOURCE:-"brainage-nb @ git+https://github.com/brainage-nb/brainage_nb@main"}

versions() {
  "$PYTHON" - <<'PY'
from importlib import metadata
for name in ("torch", "torchvision", "numpy"):
    try:
        print(f"{name}=={metadata.version(name)}")
    except metadata.PackageNotFoundError:
        pass
PY
}

constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
# Everything installed now is pinned where it is, so that the resolver may add but not change.
"$PYTHON" -m pip list --format=freeze --disable-pip-version-check | grep -E '^[A-Za-z0-9._-]+==[^@ ]+$' >"$constraints"
before=$(versions)

"$PYTHON" -m pip install --quiet --disable-pip-version-check --constraint "$constraints" "$SOURCE"

after=$(versions)
while read -r line; do
  [ -z "$line" ] || grep -qxF "$line" <<<"$after" || {
    echo "brainage_nb: installing changed $line. Restart the session and run this cell again before anything else." >&2
    exit 1
  }
done <<<"$before"
"$PYTHON" -c 'import numpy, torch, torchvision, brainage_nb; print(f"brainage_nb {brainage_nb.__version__} is ready (torch {torch.__version__}, numpy {numpy.__version__})")'
