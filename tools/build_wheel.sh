#!/usr/bin/env bash
# Build source archive and wheel into dist/, the wheel from the archive and not from the checkout.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

"${PYTHON:-python3}" -m venv "$build"
"$build/bin/pip" install --quiet hatchling
rm -rf dist
"$build/bin/python" -m hatchling build -t sdist
"$build/bin/pip" wheel --quiet --no-deps --wheel-dir dist dist/*.tar.gz
