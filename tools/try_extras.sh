#!/usr/bin/env bash
# Install the wheel with one extra at a time, each into an empty environment, and use what the extra is for.
# tools/try_extras.sh [eval|trl|lora|trackers ...]
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD python=${PYTHON:-python3}
export PIP_DISABLE_PIP_VERSION_CHECK=1 TQDM_DISABLE=1
export PIP_COMPILE=0  # most of an install is byte code of modules that are never imported
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

try_eval() {  # benchmark questions, and a task of one's own in the harness, with thoughts and without
  echo '{"question": "Which numbers are below 4?", "answer": "\\{1,2,3\\}"}' > math500.jsonl
  "$bin/forethought" questions embedded --questions.data . --questions.tasks math500 --questions.shots 0 \
    --questions.samples 1 --questions.max_tokens 8 --run runs/questions
  grep -q '"checker": "math-verify' runs/questions/questions.json
  "$bin/python" -c 'from forethought.tools.benchmarks import grade
assert grade(r"$\boxed{\{1,2\} \cup \{3\}}$", r"\{1,2,3\}").right and not grade(r"$\boxed{\{1,2\}}$", r"\{1,2,3\}").right'
  export HF_HOME=$PWD/cache HF_DATASETS_OFFLINE=1
  echo '{"text": "ball under red . swap 1 blue red , 2 green white , 3 black blue . now under", "answer": "black"}' > cups.jsonl
  cat > cups.yaml <<END
task: cups
dataset_path: json
dataset_kwargs: {data_files: {test: $PWD/cups.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["red", "blue", "green", "white", "black"]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
END
  for how in thoughts=4 thinking=False; do
    "$bin/forethought" lm-eval --model_args "path=embedded,$how" --tasks cups --include_path . --output_path "$how"
    grep -q '"acc,none"' "$how"/*/results_*.json
  done
}

try_trl() {  # both stages of post-training, and RLP inside TRL
  "$bin/forethought" posttrain sft-cups --start embedded --train.steps 2 --train.batch 4 --run runs/sft
  "$bin/forethought" posttrain rlvr-cups --start runs/sft --train.steps 1 --train.batch 2 --run runs/rlvr
  "$bin/forethought" evaluate runs/rlvr --evaluate.documents 10 --evaluate.positions 1 --evaluate.view 0
  "$bin/python" "$root/examples/trl_rlp.py" --train.steps 2
}

try_lora() {  # adapters are what is trained and kept; the policy that is written is whole
  "$bin/forethought" train quickstart --lora.r 4 --train.steps 2 --train.batch 8 --evaluate.documents 4 \
    --evaluate.positions 1 --run runs/lora
  "$bin/forethought" evaluate runs/lora --evaluate.documents 10 --evaluate.positions 1 --evaluate.view 0
}

try_trackers() {  # each without a network
  export WANDB_MODE=offline TRACKIO_DIR=$PWD/trackio
  for tracker in tensorboard wandb mlflow trackio; do
    "$bin/forethought" train quickstart --train.steps 2 --train.batch 8 --evaluate.documents 4 --evaluate.positions 1 \
      --train.tracker "$tracker" --run "runs/$tracker"
  done
  find . -name 'run-*.wandb' | grep -q .
  find . -name 'mlflow.db' -o -name mlruns | grep -q .
  # Each has the thoughts, too.
  grep -raq thoughts/text_summary runs/tensorboard --include 'events.out.tfevents.*'
  find wandb -name 'thoughts_*.table.json' | grep -q .
  find . -name thoughts.json | grep -q .
  grep -raq '"thought"' trackio
}

for extra in "${@:-eval trl lora trackers}"; do
  names="${names:-} $extra"
done
tools/build_wheel.sh
wheel=$(ls "$PWD"/dist/*.whl)
for extra in $names; do
  bin=$work/$extra/bin
  "$python" -m venv "$work/$extra"
  "$bin/pip" install --quiet --constraint requirements.lock torch==2.13.0
  pins=requirements.lock
  if [ "$extra" = trackers ]; then  # MLflow wants older versions of some of what is pinned: as a user's pip finds them
    pins=/dev/null
  fi
  "$bin/pip" install --quiet --constraint "$pins" "$wheel[$extra]" torch==2.13.0
  "$bin/pip" check
  mkdir "$work/empty-$extra"
  (cd "$work/empty-$extra" && "try_$extra")
  echo "the extra $extra installs alone and works"
  rm -rf "${work:?}/$extra"
done
