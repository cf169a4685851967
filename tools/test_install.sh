#!/bin/bash
# Installs HEAD as newcomers do, in fresh clones and fresh environments, and says what took how long.
# Usage: tools/test_install.sh PYTHON, whose environment has torch: its version is what is installed.
set -euo pipefail
python=$(realpath -s "$1")
source=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
version=$("$python" -c 'import torch; print(torch.__version__)')
unset PYTHONPATH VIRTUAL_ENV MAKEFLAGS MAKELEVEL MFLAGS

say() { printf '%4ds  %s\n' "$SECONDS" "$*"; }
fail() {
  echo "FAILED: $*" >&2
  exit 1
}
works() { (cd / && "$1" -c 'import torch, charrnn_fast as c; c.RNN(2, 3)(torch.ones(4, 1, 2))'); }

# The Makefile's way; then again; then after a pull that changes Python, and one that changes C++.
git clone -q "$source" "$work/clone"
cd "$work/clone"
git config user.name tester && git config user.email tester@localhost
make build >"$work/log" 2>&1 || { cat "$work/log"; fail "make build"; }
works "$PWD/.venv/bin/python"
say "make build, all of it"
SECONDS=0
make build >"$work/log" 2>&1
((SECONDS < 5)) || fail "a second make build took $SECONDS s"
say "make build again"
echo '# pulled' >>charrnn_fast/rnn.py && git commit -qam 'Python'
make build >"$work/log" 2>&1
((SECONDS < 10)) || fail "make build after a change to Python took $SECONDS s"
say "make build after a pull that changed Python"
echo '// pulled' >>csrc/kernels/dispatch.cpp && git commit -qam 'C++'
make build >"$work/log" 2>&1
works "$PWD/.venv/bin/python"
say "make build after a pull that changed C++"
if make build CXX=no-such-compiler VENV=other >"$work/log" 2>&1; then fail "built without a compiler"; fi
[ "$(grep -c '^error: ' "$work/log")" = 1 ] || { cat "$work/log"; fail "no compiler: not one line"; }
say "no compiler: $(grep '^error: ' "$work/log")"
make clean >/dev/null
[ -z "$(git status --porcelain --ignored)" ] || fail "make clean leaves $(git status --porcelain --ignored)"
say "make clean"

# pip's ways, into an environment that has torch.
"$python" -m venv "$work/env"
pip="$work/env/bin/python -m pip --disable-pip-version-check -q"
SECONDS=0
$pip install -c requirements/ci.txt "torch==$version" setuptools packaging 2>/dev/null
say "torch $version into a fresh environment"
$pip install -c requirements/ci.txt --no-build-isolation . 2>/dev/null
works "$work/env/bin/python"
(cd / && "$work/env/bin/charrnn-fast" info >/dev/null)
say "pip install --no-build-isolation ."
$pip uninstall -y charrnn_fast
$pip install -c requirements/ci.txt -e . 2>/dev/null
works "$work/env/bin/python"
say "pip install -e ."
$pip uninstall -y charrnn_fast
if (cd / && "$work/env/bin/python" -c 'import charrnn_fast' 2>/dev/null); then fail "uninstalled, yet there"; fi
say "pip uninstall"
