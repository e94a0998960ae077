#!/usr/bin/env bash
# Build source archive and wheel, install the wheel into an empty environment and run a short quickstart there, in an
# empty folder: what a person does who has only `pip install`. Leaves both files in dist/.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD python=${PYTHON:-python3}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_COMPILE=0  # most of an install is byte code of modules that are never imported
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

tools/build_wheel.sh
"$python" -m venv "$work/venv"
bin=$work/venv/bin
"$bin/pip" install --quiet --constraint requirements.lock torch==2.13.0
"$bin/pip" install --quiet --constraint requirements.lock dist/*.whl
"$bin/pip" check
mkdir "$work/empty" && cd "$work/empty"
"$bin/forethought" train quickstart --train.steps 3 --train.batch 8 --evaluate.documents 20 --evaluate.positions 2
"$bin/forethought" evaluate runs/quickstart --evaluate.view 1
if command -v c++ > /dev/null; then  # the C++ functions come with the wheel
  "$bin/forethought" train quickstart --model.decoding cpp --train.steps 1 --train.batch 8 --evaluate.documents 4 \
    --run runs/cpp
fi
"$bin/python" - <<'END'
import pathlib

import forethought

assert "site-packages" in forethought.__file__, forethought.__file__
assert (pathlib.Path(forethought.__file__).parent / "py.typed").is_file()
model = forethought.ThinkingModel.load("runs/quickstart/policy")
text = "".join(place.text for place in model.generate("ball under red . swap 1", max_tokens=3, thoughts=2))
for name in ("report.html", "policy/README.md", "policy/forethought.json", "evaluate.json"):
    assert (pathlib.Path("runs/quickstart") / name).is_file(), name
print(f"forethought {forethought.__version__} from a wheel writes:{text}")
END
ls -l "$root/dist"
