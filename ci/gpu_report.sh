#!/usr/bin/env bash
# The report of one GPU machine: tests, the whole matrix and benchmarks, kept under docs/hardware/.
# It needs no network. Install what the tests need before: pip install -c constraints.txt -e '.[test]'.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null

usage() {
    cat <<'END'
usage: ci/gpu_report.sh [OPTION...]

  --apex DIR   a source tree of apex that has amp (at e13873d); also $CROSSTRAIN_APEX
  --out DIR    where the report goes (default: docs/hardware)
  --name NAME  its name (default: the date and the device); to go on with a report of another day
  --only PART  run only tests, matrix or benchmarks; may be repeated. The others' results are kept
  --jobs N     tests, and cells of the matrix, at a time (default: one for two cores, at most 8)
  --cpu        dry run without a GPU: the same steps with cpu, cpu:bf16 and cpu:fp16; needs --out
  --short      a few tests, one scenario, few rounds: shows that the script works, and no more

Exit code: 0 if all parts passed; 1 if one failed; 2 if an argument is wrong or there is no GPU; 3 if
nothing is wrong but that apex is missing.
END
}

wrong() { echo "ci/gpu_report.sh: $*" >&2; exit 2; }

python="${PYTHON:-python}"
apex="${CROSSTRAIN_APEX:-}"
out="" name="" jobs="" cpu="" short="" only=()
while [ $# -gt 0 ]; do
    case "$1" in
        --apex | --out | --name | --only | --jobs)
            [ $# -ge 2 ] || wrong "$1 needs a value"
            case "$1" in
                --apex) apex="$2" ;;
                --out) out="$2" ;;
                --name) name="$2" ;;
                --only) only+=("$2") ;;
                --jobs) jobs="$2" ;;
            esac
            shift 2
            ;;
        --cpu) cpu=yes; shift ;;
        --short) short=yes; shift ;;
        --help | -h) usage; exit 0 ;;
        *) usage >&2; wrong "there is no option '$1'" ;;
    esac
done
for part in ${only[@]+"${only[@]}"}; do
    case "$part" in
        tests | matrix | benchmarks) ;;
        *) wrong "--only is tests, matrix or benchmarks, not '$part'" ;;
    esac
done
[ ${#only[@]} -gt 0 ] || only=(tests matrix benchmarks)
[ -z "$cpu" ] || [ -n "$out" ] || wrong "--cpu needs --out DIR: a dry run is no report to keep"
out="${out:-docs/hardware}"
if [ -z "$jobs" ]; then
    jobs=$(($(nproc) / 2))
    [ "$jobs" -le 8 ] || jobs=8
    [ "$jobs" -ge 1 ] || jobs=1
fi
if [ -n "$apex" ]; then
    [ -d "$apex/apex/amp" ] || wrong "$apex is no source tree of apex with amp: it has no apex/amp"
    export PYTHONPATH="$apex${PYTHONPATH:+:$PYTHONPATH}"
fi

crosstrain() { "$python" -m crosstrain.ci.cli "$@"; }
"$python" -c 'import crosstrain.ci' || wrong "crosstrain is not installed for $python"

# What is asked for.
apex_specs=apex:O0,apex:O1,apex:O2,apex:O3
if [ -n "$cpu" ]; then
    required=cpu,cpu:bf16,cpu:fp16
    device=cpu
    apex_missing=""
    label=cpu-dry-run
else
    required=cuda,cuda:tf32,cuda-amp,cuda-amp:bf16
    device=cuda
    command -v nvidia-smi >/dev/null || wrong "no NVIDIA GPU: nvidia-smi is not there; --cpu is a dry run"
    label="$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)" ||
        wrong "nvidia-smi finds no GPU; --cpu is a dry run"
    # What is missing goes to stderr. One level stands for all: they need the same.
    apex_missing="$(crosstrain doctor --json --require apex:O1 2>&1 >/dev/null)" && apex_missing=""
fi
environment="$(crosstrain doctor --json --require "$required")" ||
    wrong "the machine lacks what the report is about; see above"

label="$(printf '%s' "$label" | tr -cs 'A-Za-z0-9.\n' '-' | tr 'A-Z' 'a-z')"
name="${name:-$(date -u +%F)-$label}"
folder="$out/$name"
mkdir -p "$folder"
printf '%s\n' "$environment" >"$folder/environment.json"
if [ -n "$cpu" ]; then
    lscpu 2>/dev/null | grep -E '^(Model name|CPU\(s\)|Thread|Core|Socket)' >"$folder/device.txt" || true
else
    nvidia-smi >"$folder/device.txt" 2>&1 || true
fi
printf '%s' "$apex_missing" >"$folder/apex.txt"

# Runs a part, shows what it prints, and keeps that, its exit code and its time.
run() {
    local part="$1" began code
    shift
    printf '\n== %s: %s\n' "$part" "$*"
    began=$(date +%s)
    { printf '$ %s\n' "$*"; "$@" 2>&1; } | tee "$folder/$part.txt"
    code=${PIPESTATUS[0]}
    printf '%s %s %s\n' "$code" "$(($(date +%s) - began))" "$(date -u +%FT%TZ)" >"$folder/$part.result"
    return "$code"
}

tests() {
    local specs="$required"
    local files=(tests/conformance/test_conformance.py tests/backends/test_hardware_backends.py tests/backends/test_placement.py)
    [ -n "$cpu" ] || files+=(tests/backends/test_cuda.py tests/training/test_captured.py)
    if [ -z "$cpu" ] && [ -z "$apex_missing" ]; then
        files+=(tests/backends/test_apex.py)
        specs="$specs,$apex_specs"
    fi
    [ -z "$short" ] || files=(tests/backends/test_placement.py)
    # One at a time needs no process beside the one that asks for it.
    run tests "$python" -m pytest -q -p no:cacheprovider -n "$((jobs > 1 ? jobs : 0))" --dist=load --backends="$specs" \
        --require-backends="$specs" "${files[@]}"
}

matrix() {
    local arguments=(--backends cpu --require "$required" --jobs "$jobs" --name "$name" --timeout 300)
    [ -n "$cpu" ] || arguments+=(--require "$apex_specs")
    [ -z "$short" ] || arguments+=(--scenarios overflow)
    run matrix crosstrain matrix "${arguments[@]}" --report "$folder/matrix"
}

benchmarks() {
    local arguments=(--device "$device" --json "$folder/benchmarks.json")
    if [ -n "$short" ]; then
        arguments+=(--rounds 2 --steps 2)
    elif [ -n "$cpu" ]; then
        # So few, on a machine that others use, say nothing about the ratio.
        arguments+=(--rounds 3 --steps 4)
    else
        # fp32 takes 0.2 s a step on the largest GPUs.
        arguments+=(--check --steps 6)
    fi
    run benchmarks "$python" benchmarks/gpu_step.py "${arguments[@]}"
}

failed=()
for part in "${only[@]}"; do
    "$part" || failed+=("$part")
done

"$python" tests/stress/report_hardware.py "$folder" >"$folder.md" || failed+=(report)
printf '\nreport: %s.md\n' "$folder"
if [ -n "$apex_missing" ]; then
    echo "apex is missing, and its part with it: $apex_missing" >&2
fi
if [ ${#failed[@]} -gt 0 ]; then
    # The matrix of a machine without apex fails for that alone: it requires apex.
    if [ -n "$apex_missing" ] && [ "${failed[*]}" = matrix ] &&
        "$python" tests/stress/report_hardware.py "$folder" --fails-for-apex-alone; then
        exit 3
    fi
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
[ -z "$apex_missing" ] || exit 3
