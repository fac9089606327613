#!/usr/bin/env bash
# Train the paper's Tiny ImageNet rows on a machine with a GPU and no network, as far as they get in the given time:
# MobileNetV2 and ResNet50 with and without MFD, more seeds of both, the other reading of Eq. 6, the other networks.
# The same command goes on where it stopped (exit code 142 after the given time, 1 if a run failed; the others go on).
# Results are in results/, runs in runs/reproduce/.
#
#   train_scripts/tiny_imagenet.sh DATA MINUTES [RUNS_AT_A_TIME]
#
# DATA holds tiny-imagenet-200/ as its archive unpacks. Four runs at a time share the GPU, or as many as you say.
set -euo pipefail

fail() { echo "tiny_imagenet.sh: error: $1" >&2; exit 2; }
whole() { [[ $1 =~ ^[1-9][0-9]*$ ]] || fail "$2 must be a whole number above 0, not '$1'"; }

(( $# == 2 || $# == 3 )) || fail "usage: train_scripts/tiny_imagenet.sh DATA MINUTES [RUNS_AT_A_TIME]"
minutes=$2 at_a_time=${3:-4}
whole "$minutes" MINUTES
whole "$at_a_time" RUNS_AT_A_TIME
data=$(realpath -e "$1" 2>/dev/null) || fail "'$1' does not exist; DATA is the folder that holds tiny-imagenet-200/"
python -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || fail "there is no GPU that torch can use"
end=$(( $(date +%s) + 60 * minutes ))
cd "$(dirname "$0")/.."
failed=0

train() {
    local left=$(( end - $(date +%s) ))
    if (( left <= 120 )); then
        echo "stopped at the time limit; the same command goes on"
        exit 142
    fi
    local code=0
    python train_scripts/reproduce.py run "$@" --data-dir "$data" --time-limit "$(( left / 60 ))" \
        --parallel "$at_a_time" --mixed-precision bf16 --compile --workers 4 || code=$?
    (( code <= 128 )) || exit "$code"  # the time is over, or somebody wants it to stop
    (( code == 0 )) || failed=1
}

train --rows mobilenetv2/tiny_imagenet resnet50/tiny_imagenet --seeds 3
train --table eq6 --seeds 3
train --rows resnext50/tiny_imagenet densenet121/tiny_imagenet --seeds 3
python train_scripts/reproduce.py report
exit "$failed"
