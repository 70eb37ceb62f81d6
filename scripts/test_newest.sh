#!/usr/bin/env bash
# The whole test suite on the newest Python that is here and the newest packages that setup.cfg allows.
#
#   scripts/test_newest.sh [arguments of pytest]
#
# Takes Python 3.14, 3.13 or 3.12 from PATH or pyenv. Where there is none, or with DEBIAN=1, it makes a
# Debian 13 (Python 3.13, glibc 2.41) with debootstrap, which needs root. Everything, a copy of this
# checkout too, is in a temporary folder that is removed at the end.
set -euo pipefail
cd "$(dirname "$0")/.."

newest_python() {
  local minor python
  for minor in 14 13 12; do
    for python in $(type -ap "python3.$minor") "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.$minor".*/bin/python; do
      # pyenv's shims may lead nowhere, and Debian has venv and pip in a package of its own.
      if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "$python"
        return
      fi
    done
  done
}

python=""
[[ -n ${DEBIAN:-} ]] || python=$(newest_python)
if [[ -z $python ]] && { [[ $EUID != 0 ]] || ! type -P debootstrap >/dev/null; }; then
  echo "error: needs Python 3.12 or newer with venv, on PATH or in pyenv; or root and debootstrap, which make one" >&2
  exit 2
fi

work=$(mktemp -d)
trap 'rm -rf --one-file-system "$work"' EXIT
mkdir "$work/source"
git ls-files -z --cached --others --exclude-standard |
  while IFS= read -r -d '' file; do [[ ! -e $file ]] || printf '%s\0' "$file"; done |
  tar --create --null --files-from - | tar --extract --directory "$work/source"

# What runs in the new environment: $1 is its Python, $2 the copy, the rest goes to pytest.
cat >"$work/check.sh" <<'CHECK'
set -euo pipefail
python=$1
cd "$2"
shift 2
"$python" -m venv ../environment
python=../environment/bin/python
"$python" -m pip install --quiet --upgrade pip
"$python" -m pip install --quiet -e '.[test]'
"$python" -VV
"$python" -m pip freeze --exclude-editable
JAX_PLATFORMS=cpu PATH="$PWD/../environment/bin:$PATH" "$python" -m pytest "$@"
CHECK

if [[ -n $python ]]; then
  bash "$work/check.sh" "$python" "$work/source" "$@"
  exit
fi

root="$work/debian"
debootstrap --variant=minbase --include=python3-venv,ca-certificates,git trixie "$root" >"$work/debootstrap.log" ||
  { tail "$work/debootstrap.log" >&2; exit 1; }
mkdir "$root/work"
mv "$work/source" "$work/check.sh" "$root/work"
# Names, certificates and pip's settings are those of this machine.
for file in /etc/resolv.conf /etc/hosts /etc/pip.conf "$HOME/.config/pip/pip.conf" /etc/ssl/certs \
  "${PIP_CERT:-}" "${SSL_CERT_FILE:-}" "${REQUESTS_CA_BUNDLE:-}"; do
  [[ ! -e $file ]] || cp --recursive --dereference --parents "$file" "$root" 2>/dev/null || true
done
# /proc is mounted in a namespace of its own, and so is gone with it.
unshare --mount --pid --fork chroot "$root" /bin/bash -c \
  'mount -t proc proc /proc && bash /work/check.sh python3 /work/source "$@"' check "$@"
