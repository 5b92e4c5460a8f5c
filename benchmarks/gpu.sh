#!/usr/bin/env bash
# Kernel tests and all GPU benchmarks on one GPU, within 8 minutes: bash benchmarks/gpu.sh [FOLDER]
#
# Writes tables (CSV), plots (PNG) and a log to FOLDER (default: $OUT, else benchmarks/results). Runs from a checkout,
# installed or not; needs torch, triton, torchvision, timm, safetensors, rich and matplotlib.
#
#   SECONDS_TESTS, SECONDS_MEMCHECK, SECONDS_BENCH   limits, default 120, 60 and 250
#   PARTS    some of "tests memcheck layers halo models", default all
#   PYTHON   the interpreter, default python3
#   DRY=1    a dry run on a CPU, with very small cases, without tests and memcheck
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=${1:-${OUT:-$root/benchmarks/results}}
python=$(realpath --no-symlinks "$(command -v "${PYTHON:-python3}")")
parts=${PARTS:-tests memcheck layers halo models}
mkdir -p "$folder"
rm -f "$folder/gpu.log"
folder=$(cd "$folder" && pwd)

# If the package is not installed, it is assembled from links to the folders of the checkout.
links=$(mktemp -d)
trap 'rm -rf "$links"' EXIT
mkdir "$links/foveal"
ln -s "$root"/foveal/* "$links/foveal/"
for part in kernels backbones heads configs train weights benchmarks; do
  ln -sfn "$root/$part" "$links/foveal/$part"
done
export PYTHONPATH="$links${PYTHONPATH:+:$PYTHONPATH}"
cd "$links" # where no folder of the checkout can be taken for another package

status=0
finish() { # what has run, whatever it said
  local code=$1 what=$2
  if [ "$code" -ne 0 ]; then
    echo "$what: exit code $code" | tee -a "$folder/gpu.log"
    status=1
  fi
}

bench=()
for part in $parts; do
  [[ "$part" == tests || "$part" == memcheck ]] || bench+=("$part")
done

sweeps=(--rootdir "$root" -c "$root/pyproject.toml" -q -W ignore -p no:cacheprovider -m "not slow"
  "$root/tests/kernels/triton_attention.py" "$root/tests/kernels/triton_aggregate.py")
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # which matrix products that are the same every time need
if [[ " $parts " == *" tests "* && -z "${DRY:-}" ]]; then
  code=0
  spread=() # most of the time goes into compiling, which processes share
  ! "$python" -c "import xdist" 2>/dev/null || spread=(-n 8)
  timeout "${SECONDS_TESTS:-120}" "$python" -m pytest "${sweeps[@]}" "${spread[@]}" 2>&1 | tee "$folder/gpu-tests.log" || code=$?
  finish "$code" "tests"
fi
if [[ " $parts " == *" memcheck "* && -z "${DRY:-}" ]]; then
  if command -v compute-sanitizer >/dev/null; then
    code=0
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "${SECONDS_MEMCHECK:-60}" \
      compute-sanitizer --tool memcheck --error-exitcode 7 \
      "$python" -m pytest "${sweeps[@]}" -k "test_small or h5w6-k3-shift" 2>&1 | tee "$folder/gpu-memcheck.log" || code=$?
    finish "$code" "memcheck"
  else
    echo "memcheck: there is no compute-sanitizer here; not run" | tee -a "$folder/gpu.log"
  fi
fi

if [ "${#bench[@]}" -gt 0 ]; then
  options=("${bench[@]}" --device cuda --output "$folder" --seconds "${SECONDS_BENCH:-250}")
  [ -z "${DRY:-}" ] || options+=(--device cpu --tiny)
  code=0
  # a compilation can exceed the budget by its own duration
  timeout "$((${SECONDS_BENCH:-250} + 40))" "$python" -m foveal.benchmarks.run "${options[@]}" 2>&1 | tee -a "$folder/gpu.log" || code=$?
  finish "$code" "benchmarks"
  code=0
  "$python" -m foveal.benchmarks.run plots "$folder" || code=$?
  finish "$code" "plots"
fi
exit "$status"
