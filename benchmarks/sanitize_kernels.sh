#!/usr/bin/env bash
# Runs a small part of the kernels' tests under each tool of NVIDIA's compute-sanitizer: memory out of bounds, races in
# shared memory, barriers that not all threads reach, and reads of memory that nobody wrote.
#
#     benchmarks/sanitize_kernels.sh [TESTS]
#
# TESTS is an expression for pytest's -k. PYTHON and COMPUTE_SANITIZER name other programs than those found. Each access
# to memory is checked, so this takes many times as long as the tests by themselves. The status is 0 if no tool found
# anything, 1 otherwise, and 2 if something that is needed is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

tests=${1:-"no_room or no_sense or (is_exact and 6-2-3-heads and not 300 and not 1000) or multiple_of_128"}

missing() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

python=${PYTHON:-}
if [[ -z $python ]]; then
    python=.venv/bin/python
    [[ -x $python ]] || python=python3
fi
command -v "$python" >/dev/null || missing "there is no $python; make the set-up (make test), or name one in PYTHON"
"$python" -c 'import pytest, torch' 2>/dev/null || missing "$python has no pytest or no torch; run: pip install -e '.[dev]'"

sanitizer=${COMPUTE_SANITIZER:-}
if [[ -z $sanitizer ]]; then
    sanitizer=compute-sanitizer
    command -v "$sanitizer" >/dev/null || sanitizer=/usr/local/cuda/bin/compute-sanitizer
fi
command -v "$sanitizer" >/dev/null ||
    missing "compute-sanitizer is not found; it comes with the CUDA toolkit: install that, or name the program in COMPUTE_SANITIZER"

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    missing "torch finds no NVIDIA GPU here; the kernels can only be checked on one"

# Allocations of their own, and not parts of torch's: then what is beyond one is beyond memory.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1

options=$("$sanitizer" --help 2>&1 || true)
failed=()
for tool in memcheck racecheck synccheck initcheck; do
    arguments=(--tool "$tool" --error-exitcode 1 --target-processes all)
    # Only these kernels; but initcheck has to see what torch's kernels write, or it takes it for never written.
    if [[ $tool != initcheck && $options == *--kernel-regex* ]]; then
        arguments+=(--kernel-regex kns=gta_)
    fi
    printf '\n== %s\n' "$tool"
    if ! "$sanitizer" "${arguments[@]}" "$python" -m pytest -q -p no:cacheprovider -m gpu \
        tests/plugins/attention/test_kernels_gpu.py tests/plugins/matmul/test_kernels_gpu.py -k "$tests"; then
        failed+=("$tool")
    fi
done

if ((${#failed[@]})); then
    printf '\nfound something, or could not run: %s\n' "${failed[*]}" >&2
    exit 1
fi
printf '\nall four tools found nothing\n'
