# Sourced by the other scripts: makes .venv where there is none, and installs this checkout into it.
# Usage: source scripts/environment.sh EXTRA    "" for none: without an argument `source` passes on those of the script.
# Installs again when the build files or the C++ sources change.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra="$1"

find_python() {
  local candidate
  for candidate in python3.12 python3.11 python3 python; do
    if command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys, venv; raise SystemExit(not (3, 11) <= sys.version_info[:2])' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "kvrelay needs Python 3.11 or newer with the venv module; none of python3.12, python3.11, python3 is" >&2
  return 1
}

[ -x .venv/bin/python ] || "$(find_python)" -m venv .venv
digest="$(cat pyproject.toml setup.py kernels/csrc/* 2>/dev/null | cksum | cut -d' ' -f1)-$(pwd | cksum | cut -d' ' -f1)"
installed=".venv/installed-$digest-${extra:-base}"
[ -n "$extra" ] || installed="$(compgen -G ".venv/installed-$digest-*" | head -n 1 || true)" # any extra has the base in it
if [ ! -e "$installed" ]; then
  echo "Installing kvrelay${extra:+[$extra]} into .venv …" >&2
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}"
  touch ".venv/installed-$digest-${extra:-base}"
fi
