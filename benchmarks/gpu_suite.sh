#!/usr/bin/env bash
# Everything that is measured on one card, in at most nine minutes:
#     benchmarks/gpu_suite.sh [OUT]
# OUT (runs/gpu-suite) gets NAME.json and NAME.log of each part as it ends, and summary.txt: name, exit status, seconds.
# Each part has a time limit of its own, and a part that fails does not stop the others. In the environment:
#   PYTHON            the interpreter (python)
#   MODEL, TEXT, HELD SmolLM2's path, its text and held-out text; empty: the last two parts are left out
#   QUICK=1           tiny shapes, on a CPU too, to see that it all runs; ten times the time limits
#   DRY=1             print the commands only
set -u
cd "$(dirname "$0")/.."
OUT=${1:-runs/gpu-suite} PYTHON=${PYTHON:-python}
slack=${QUICK:+10} slack=${slack:-1}  # a CPU compiles slowly, and may not multiply in bf16
LIMIT=$((540 * slack))
MODEL=${MODEL-models/SmolLM2-135M-Instruct.Q4_1.gguf} TEXT=${TEXT-text/*.train.jsonl.gz} HELD=${HELD-text/*.heldout.jsonl.gz}
quick=${QUICK:+--quick}
[ -n "${DRY:-}" ] || mkdir -p "$OUT"

# part NAME SECONDS COMMAND...: run a command within its limit and what is left of the whole
part() {
    local name=$1 limit=$2 begun=$SECONDS
    shift 2
    if [ -n "${DRY:-}" ]; then printf '%q ' "$name" "$limit" "$@"; echo; return; fi
    limit=$((limit * slack))
    limit=$((limit < LIMIT - SECONDS ? limit : LIMIT - SECONDS))
    [ "$limit" -gt 5 ] || { echo "$name: no time left" | tee -a "$OUT/summary.txt"; return 1; }
    timeout --kill-after=5 "$limit" "$@" > "$OUT/$name.log" 2>&1
    echo "$name $? $((SECONDS - begun)) s" | tee -a "$OUT/summary.txt"
}
gpu() {
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$PYTHON" benchmarks/gpu.py $quick --json "$OUT/$name.json" "$@"
}

gpu exactness 50 --parts exactness
gpu resume 40 --parts resume
gpu offload 40 --parts offload --lengths 64
for length in 64 256 1024; do  # a few steps and the compilation of what follows the logits
    gpu "steps-$length" 80 --parts steps --repeats 1 --lengths "$length"
done
gpu update 75 --parts update ways --repeats 2 --lengths 256
gpu update-positions 40 --parts ways --repeats 1 --lengths 64 --positions 8
gpu decoding 35 --parts decoding --kinds cuda_graphs generate --lengths 64
gpu decoding-hybrid 20 --parts decoding --kinds eager cuda_graphs --lengths 64 --model "nemotron_h 8x256"

# SmolLM2: the prediction term and its control, for as many steps as the rest allows, each evaluated before and after
[ -n "$MODEL" ] && { [ -n "${DRY:-}" ] || [ -e "$MODEL" ]; } || { echo "smollm2: no model"; exit 0; }
smollm2() {  # NAME SECONDS STEPS OPTION...
    local name=$1 limit=$2 steps=$3
    shift 3
    part "$name" "$limit" "$PYTHON" -m forethought train smollm2-full --model.path "$MODEL" --corpus.path "$TEXT" \
        --run "$OUT/$name" --overwrite True --corpus.window 256 --method.group 8 --method.thought_length 32 \
        --method.warmup_steps 0 --train.batch 32 --train.steps "$steps" --train.checkpoint_every 1000 "$@"
}
smollm2 smollm2-probe 60 4
each=$(((LIMIT - SECONDS) / 2))
steps=20
[ -n "${DRY:-}" ] || steps=$("$PYTHON" - "$OUT/smollm2-probe/metrics.jsonl" "$each" << 'END'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
print(max(1, int(0.5 * float(sys.argv[2]) / min(row["time/step_s"] for row in rows))))  # half is left to start and evaluate
END
)
smollm2 rlp-full "$each" "${steps:-1}" --evaluate.path "$HELD" --evaluate.documents 100
smollm2 rlp-full-random $((LIMIT - SECONDS)) "${steps:-1}" --evaluate.path "$HELD" --evaluate.documents 100 --method.reward random
