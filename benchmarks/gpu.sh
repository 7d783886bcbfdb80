#!/usr/bin/env bash
# Correctness and speed on a machine with a GPU, in less than 10 minutes, without network or installation.
#
#   OUT=results bash benchmarks/gpu.sh        # OUT: the folder for rows and logs (default: benchmarks/results)
#   DEVICE=cpu SHAPE=tiny LONG=64 bash benchmarks/gpu.sh    # tries the script itself without a GPU
#
# Every part has a time limit; one that fails or runs out of time is named in the summary, and the next one goes on.
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT="${OUT:-$PWD/benchmarks/results}" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error TOKENIZERS_PARALLELISM=false
device="${DEVICE:-cuda}" shape="${SHAPE:-llama-3.2-1b}" large="${LARGE:-llama-3.1-8b}" long="${LONG:-2048}"
python="${PYTHON:-python3}"
mkdir -p "$OUT"
summary=()

part() { # part NAME SECONDS COMMAND...: runs it, its output in a log in $OUT and its end on the terminal
    local name=$1 seconds=$2 begin=$SECONDS code
    shift 2
    echo "== $name (at most $seconds s)"
    timeout --kill-after=10 "$seconds" "$@" >"$OUT/gpu-$name.log" 2>&1
    code=$?
    tail -n 25 "$OUT/gpu-$name.log" | cut -c1-240
    case $code in
        0) summary+=("ok    $name, $((SECONDS - begin)) s") ;;
        124 | 137) summary+=("TIME  $name: stopped after $seconds s") ;;
        *) summary+=("FAIL  $name: exit code $code, see gpu-$name.log") ;;
    esac
}

decode() { # decode NAME SECONDS ARGUMENTS...: rows are added to gpu.jsonl in $OUT
    local name=$1 seconds=$2
    shift 2
    part "$name" "$seconds" "$python" -m benchmarks.decode --device "$device" --out "$OUT/gpu.jsonl" "$@"
}

part machine 20 "$python" -c '
import sys, torch, transformers, hf_accel_patch
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(sys.version.split()[0], "torch", torch.__version__, "transformers", transformers.__version__, gpu)
print("hf_accel_patch", hf_accel_patch.__version__)
'
parallel=()
"$python" -c "import xdist" 2>/dev/null && parallel=(-n 8)
part tests 110 "$python" -m pytest -q -m "not slow" --maxfail=20 "${parallel[@]}" -p no:cacheprovider tests
decode decode 90 --shape "$shape" --systems stock exact graphs int8 int8-graphs int4 int4-graphs --rounds 4 --limit 40
decode decode-large 80 --shape "$large" --systems stock exact graphs --rounds 4 --limit 60
part graphs 35 "$python" -m benchmarks.graphs --device "$device" --out "$OUT/gpu.jsonl" --shape "$shape" --rounds 20
part graphs-large 35 "$python" -m benchmarks.graphs --device "$device" --out "$OUT/gpu.jsonl" --shape "$large" \
    --prompt "$long" --rounds 10
decode padded 50 --shape "$shape" --systems stock exact graphs --batch 8 --prompt "$long" --padded --tokens 17 --rounds 4 --limit 40
decode long 35 --shape "$shape" --systems stock exact --prompt "$((4 * long))" --tokens 5 --rounds 5 --limit 30
part attention 25 "$python" -m benchmarks.attention_kernels --device "$device" --out "$OUT/gpu.jsonl" \
    --backends torch triton flash-attn --length "$((8 * long))" --rounds 5 --limit 20
part kvcache 55 "$python" -m benchmarks.kvcache --device "$device" --out "$OUT/gpu.jsonl" --parts decode --shape "$shape" \
    --caches exact int8 int4 --contexts "$((4 * long))" "$((16 * long))" --rounds 4 --load-limit 35 --limit 20 --run-limit 8
part speculative 60 "$python" -m benchmarks.speculative --device "$device" --out "$OUT/gpu.jsonl" --shape "$shape" \
    --parts acceptance costs held --tasks continuation --prompts 4 --rounds 3 --held-prompts 2 --new 64 --limit 45

echo "== summary (rows in gpu.jsonl, logs in gpu-*.log)"
printf '%s\n' "${summary[@]}"
[ ! -s "$OUT/gpu.jsonl" ] || "$python" -m benchmarks.table "$OUT/gpu.jsonl"
case "${summary[*]}" in *FAIL* | *TIME*) exit 1 ;; esac
