#!/usr/bin/env bash
# Make brainage_nb ready on Colab, on Kaggle (also without internet) or locally. Adds what is missing and changes
# nothing that is there; proves it for torch, torchvision and numpy. Safe to run twice. The set-up cell of each
# notebook runs this; by hand: bash colab_setup.sh
#
# The package comes from the first of these that there is:
#   BRAINAGE_SOURCE        a folder (a checkout, or a wheel data set), a wheel or an archive; a path or an address
#   a wheel data set       attached on Kaggle, recognised by its file brainage_wheels.json
#   this script's folder   where that is a checkout or a wheel data set
#   the release below      from its repository
# PYTHON names the interpreter to install for (python3 where it is not set).
set -euo pipefail

PYTHON=${PYTHON:-python3}
VERSION=0.1.0
REPOSITORY=https://github.com/brainage-nb/brainage_nb
MARKER=brainage_wheels.json

fail() {
  echo "brainage_nb is NOT ready: $*" >&2
  exit 1
}

# name==version of everything installed, less ourselves, in the form of a constraints file
installed() {
  "$PYTHON" -P - <<'PY'
import re
from importlib import metadata
found = {}
for package in metadata.distributions():  # in the order of the path: the first of a name is the one in use
    name = re.sub(r"[-_.]+", "-", package.metadata["Name"] or "").lower()
    if name and re.fullmatch(r"\d[\w.!+]*", package.version or ""):
        found.setdefault(name, package.version)
print(*sorted(f"{name}=={version}" for name, version in found.items() if name != "brainage-nb"), sep="\n")
PY
}

# version, place and list of files (by its hash) of the three packages that must stay as they are
untouchable() {
  "$PYTHON" -P - <<'PY'
import hashlib
from importlib import metadata
for name in ("torch", "torchvision", "numpy"):
    try:
        package = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        continue
    files = hashlib.sha256((package.read_text("RECORD") or "").encode()).hexdigest()
    print(name, package.version, package.locate_file(""), files)
PY
}

# sets `from`: where the package comes from, as said above
choose_place() {
  local marker here=${BASH_SOURCE[0]:-}
  from=${BRAINAGE_SOURCE:-}
  [[ $from != -* ]] || from=./$from  # a name, not an option
  [ -z "$from" ] || return 0
  for marker in /kaggle/input/*/$MARKER /kaggle/input/*/*/$MARKER /kaggle/input/*/*/*/$MARKER; do
    if [ -f "$marker" ]; then
      from=$(dirname "$marker")
      return 0
    fi
  done
  from=$REPOSITORY/archive/refs/tags/v$VERSION.tar.gz
  [[ $here == *colab_setup.sh ]] || return 0  # piped into bash it lies nowhere
  here=$(cd "$(dirname "$here")" && pwd)
  if [ -f "$here/pyproject.toml" ] || [ -f "$here/$MARKER" ]; then from=$here; fi
}

# sets `arguments`: how pip is told of that place
choose_arguments() {
  if [ -f "$from/$MARKER" ]; then
    arguments=(--no-index "--find-links=$from" "brainage-nb==$VERSION")
  elif [ -e "$from" ]; then
    arguments=(-- "$from")
  elif [[ $from == *://*/ ]]; then
    arguments=("--find-links=$from" "brainage-nb==$VERSION")
  elif [[ $from == *://* ]]; then
    arguments=("brainage-nb@$from")
  else
    fail "BRAINAGE_SOURCE=$from is neither a file or folder that is there nor an address"
  fi
}

is_installed() {
  "$PYTHON" -P -c "from importlib import metadata; assert metadata.version('brainage-nb') == '$VERSION'; import brainage_nb" 2>/dev/null
}

install() {
  "$PYTHON" -m pip --version >/dev/null 2>&1 || fail "this Python has no pip; run: $PYTHON -m ensurepip"
  choose_arguments
  echo "brainage_nb: installing from $from"
  constraints=$(mktemp)
  trap 'rm -f "$constraints"' EXIT
  echo "$before" >"$constraints"
  PIP_ROOT_USER_ACTION=ignore "$PYTHON" -m pip install --quiet --progress-bar off --disable-pip-version-check \
    --constraint "$constraints" "${arguments[@]}" </dev/null ||
    fail "pip could not add what is missing beside what is there; its message is above. Nothing was changed."
}

# fails where a line of the first text is not in the second
nothing_lost() {
  local lost
  lost=$(grep -vxFf <(printf '%s\n' "$2") <<<"$1" | grep . || true)
  [ -z "$lost" ] || fail "installing changed what was there: $(echo $lost). Start a new session before anything else."
}

main() {
  "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
    fail "Python 3.11, 3.12 or 3.13 is needed; $PYTHON is $("$PYTHON" --version 2>&1)"
  local from before kept after added
  choose_place
  before=$(installed)
  kept=$(untouchable)
  if [ -n "${BRAINAGE_SOURCE:-}" ] || ! is_installed; then install; fi
  after=$(installed)
  nothing_lost "$before" "$after"
  nothing_lost "$kept" "$(untouchable)"
  added=$(grep -vxFf <(printf '%s\n' "$before") <<<"$after" | tr '\n' ' ' || true)
  "$PYTHON" -P - "$added" <<'PY' || fail "it is installed, but not everything can be imported; the error is above"
import sys
import numpy, torch, torchvision, brainage_nb
versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, numpy {numpy.__version__}"
added = sys.argv[1].strip() or "nothing"
print(f"brainage_nb {brainage_nb.__version__} is ready. Added: {added}. In use: {versions}.")
PY
}

main
