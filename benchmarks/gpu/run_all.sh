#!/usr/bin/env bash
# Everything that is to be measured on a GPU, in order of importance. Call it again to go on where it stopped.
#
#   [BUDGET_S=540] [RUNS="runs/cifar10 ..."] bash benchmarks/gpu/run_all.sh RESULTS [STEP ...]
#
# RESULTS is the folder of the result files; files from an earlier call there are gone on with. WORK keeps networks
# and engines between calls on one machine. REHEARSE=1 goes the same way on a CPU with small networks.
set -uo pipefail

results=$(realpath -m "${1:?usage: run_all.sh RESULTS [STEP ...]}"); shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=${WORK:-/tmp/sparsify-gpu}
runs=(); for run in ${RUNS:-}; do runs+=(--run "$run"); done
end=$(( $(date +%s) + ${BUDGET_S:-540} ))
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(doctor chains engines32 runs32 gemm qdq engines predictor targets)
cd "$root" || exit 2
mkdir -p "$results" "$work"
export PYTHONPATH=$root:$root/benchmarks TRT_PYTHONPATH=$root:$root/benchmarks PYTHONUNBUFFERED=1

if [ -n "${REHEARSE:-}" ]; then
    trt=${TRT_PYTHON:-python3}; torch=${TORCH_PYTHON:-python3}
    how=(--runtime "${RUNTIME:-openvino}" --scale small --rounds 3 --round-ms 5); gemm=(--device cpu --rehearse --rounds 3)
    first=4; rest=(2); alike=(--gpu h100)
else
    trt=${TRT_PYTHON:-trt-python}; torch=${TORCH_PYTHON:-python3}
    how=(--runtime tensorrt); gemm=()
    first=32; rest=(8 1 256); alike=()
fi

# step NAME SECONDS COMMAND...: at most SECONDS, and no more than is left of the call; {budget} stands for that
failed=()
step() {
    local name=$1 seconds=$2 left status; shift 2
    left=$(( end - $(date +%s) - 5 ))
    (( left < seconds )) && seconds=$left
    if (( seconds < 10 )); then echo "== $name: no time left, call again"; failed+=("$name"); return; fi
    echo "== $name, $seconds s"
    # an interrupt, so that the job it falls upon is not counted as one that kills the process
    timeout -s INT -k 20 "$seconds" "${@//\{budget\}/$seconds}"; status=$?
    (( status == 0 )) || { echo "== $name: exit code $status"; failed+=("$name"); }
}

for name in "${steps[@]}"; do
    case $name in
        doctor)    step doctor 60 "$trt" -m sparsify_deploy doctor ;;
        chains)    step chains 120 "$trt" -m gpu.qdq --out "$results/qdq.json" --work "$work" "${how[@]}" \
                       --budget-s '{budget}' --batches $first --nets conv_chain linear_chain ;;
        engines32) step engines32 400 "$trt" -m gpu.engines --out "$results/engines.json" --work "$work" "${how[@]}" \
                       --budget-s '{budget}' --batches $first ;;
        runs32)    (( ${#runs[@]} )) && step runs32 240 "$trt" -m gpu.engines --out "$results/engines.json" \
                       --work "$work" "${how[@]}" --budget-s '{budget}' --batches $first --nets "${runs[@]}" ;;
        gemm)      step gemm 300 "$torch" -m gpu.gemm --out "$results/gemm.json" --budget-s '{budget}' "${gemm[@]}" ;;
        qdq)       step qdq 400 "$trt" -m gpu.qdq --out "$results/qdq.json" --work "$work" "${how[@]}" \
                       --budget-s '{budget}' --batches $first ;;
        engines)   step engines 500 "$trt" -m gpu.engines --out "$results/engines.json" --work "$work" "${how[@]}" \
                       --budget-s '{budget}' --batches $first "${rest[@]}" "${runs[@]}" ;;
        predictor) step predictor 60 "$trt" -m gpu.predictor "$results" "${alike[@]}" ;;
        targets)   step targets 30 "$trt" -m gpu.targets "$results" ;;
        *) echo "run_all.sh: unknown step $name" >&2; exit 2 ;;
    esac
done
(( ${#failed[@]} )) && { echo "not finished: ${failed[*]}"; exit 1; }
echo "finished: $results"
