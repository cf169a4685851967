#!/bin/sh
# Says in one line what this machine lacks for a build. Usage: tools/preflight.sh PYTHON
python=$1
fail() {
  echo "error: $*" >&2
  exit 1
}

command -v "$python" >/dev/null || fail "$python was not found; install Python 3.10 or newer, or name one: make PYTHON=..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "charrnn_fast needs Python 3.10 or newer; $python is $("$python" -V 2>&1). Name another: make PYTHON=..."
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "$python cannot make virtual environments; install its venv package (Debian, Ubuntu: apt install python3-venv)."
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
  fail "Python.h was not found; install the headers of $python (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)."

if [ -n "$CXX" ]; then
  command -v "${CXX%% *}" >/dev/null || fail "the C++ compiler named by CXX, $CXX, was not found."
else
  for CXX in c++ g++ clang++ ''; do
    [ -z "$CXX" ] || ! command -v "$CXX" >/dev/null || break
  done
  [ -n "$CXX" ] || fail "no C++ compiler was found; install g++ 11 or newer, or clang (Debian, Ubuntu: apt install g++)."
fi
# Unquoted: CXX may hold a wrapper or flags.
accepts() { printf '%s\n' "$1" | $CXX -std=c++20 -fopenmp -E -x c++ - >/dev/null 2>&1; }
accepts '#include <version>' || fail "$CXX does not know C++20; install g++ 11 or newer, or clang, or name another: CXX=..."
accepts '#include <omp.h>' ||
  fail "$CXX has no OpenMP, without which the threads would not work; install it (for clang on Debian, Ubuntu: apt install libomp-dev)."
