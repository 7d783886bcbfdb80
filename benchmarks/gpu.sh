#!/usr/bin/env bash
# Correctness and speed on a machine with a GPU, in less than twenty minutes, without network or installation.
#
#   OUT=results bash benchmarks/gpu.sh        # OUT: the folder for rows and logs (default: benchmarks/results)
#   DEVICE=cpu SHAPE=tiny LARGE=tiny LONG=64 LAYERS=1 bash benchmarks/gpu.sh    # tries the script itself without a GPU
#   PARTS="machine decode graphs" bash benchmarks/gpu.sh               # some parts only
#
# Every part has a time limit; one that fails or runs out of time is named in the summary, and the next one goes on. The
# limits together are twenty minutes; PARTS chooses. What has no rows yet comes first. A system that is compared
# has a process of its own, which took 17 s on the machine of the rows to import, start CUDA and make a 1B model, and 25 s
# with an 8B one; those of a part begin together. Triton compiles for seconds what it has not compiled
# before, so what the benchmarks need is compiled beside the tests.
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT="${OUT:-$PWD/benchmarks/results}" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error TOKENIZERS_PARALLELISM=false
device="${DEVICE:-cuda}" shape="${SHAPE:-llama-3.2-1b}" large="${LARGE:-llama-3.1-8b}" long="${LONG:-2048}"
python="${PYTHON:-python3}" layers="${LAYERS:-}"
mkdir -p "$OUT"
log="$OUT/gpu.log" scratch=$(mktemp -d) summary=() signal=TERM
trap 'rm -rf "$scratch"' EXIT
: >"$log"

asked() { # asked NAME: whether this part is to run, by its first word
    [[ -z "${PARTS:-}" || " $PARTS " == *" ${1%% *} "* ]]
}

part() { # part NAME SECONDS COMMAND...: runs it, its output in the log and its end on the terminal
    local name=$1 seconds=$2 begin=$SECONDS code lines
    shift 2
    asked "$name" || return 0
    echo "== $name (at most $seconds s)" | tee -a "$log"
    lines=$(wc -l <"$log")
    timeout --signal="$signal" --kill-after=10 "$seconds" "$@" >>"$log" 2>&1
    code=$?
    tail -n "+$((lines + 1))" "$log" | tail -n 25 | cut -c1-240
    case $code in
        0) summary+=("ok    $name, $((SECONDS - begin)) s") ;;
        124 | 137) summary+=("TIME  $name: stopped after $seconds s") ;;
        *) summary+=("FAIL  $name: exit code $code, see gpu.log") ;;
    esac
}

decode() { # decode NAME SECONDS ARGUMENTS...: rows are added to gpu.jsonl in $OUT
    local name=$1 seconds=$2
    shift 2
    part "$name" "$seconds" "$python" -m benchmarks.decode --device "$device" --out "$OUT/gpu.jsonl" "$@"
}

compiling=()
compile() { # compile NAME COMMAND...: beside what follows; no row of it counts
    local name=$1
    shift
    asked tests || return 0
    timeout --kill-after=10 105 "$@" --device "$device" --out "$scratch/compiled.jsonl" >"$scratch/$name.log" 2>&1 &
    compiling+=($!)
}

part machine 18 "$python" -c '
import sys, torch, transformers, hf_accel_patch
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(sys.version.split()[0], "torch", torch.__version__, "transformers", transformers.__version__, gpu)
print("hf_accel_patch", hf_accel_patch.__version__)
'
for each in int8 int4; do
    compile "$each" "$python" -m benchmarks.decode --shape "$shape" --systems "$each" --rounds 1 --tokens 3 --limit 100
    compile "cache-$each" "$python" -m benchmarks.kvcache --parts decode --shape "$shape" --layers 2 --caches "$each" \
        --contexts "$((4 * long))" --rounds 1 --steps 1
done
compile padded "$python" -m benchmarks.decode --shape "$shape" --systems exact --batch 8 --prompt "$long" --padded \
    --rounds 1 --tokens 3 --limit 100
compile linear "$python" -m benchmarks.linear_kernels --shape "$large" --layers 1 --systems int8 int4 nf4 --rounds 1 \
    --rows 1 2 16 32 --rotate 1
compile attention "$python" -m benchmarks.attention_kernels --backends triton --length "$((2 * long))" --rounds 1
compile attention-decode "$python" -m benchmarks.attention_decode --contexts "$((4 * long))" --bytes 1 --rounds 1
parallel=()
"$python" -c "import xdist" 2>/dev/null && parallel=(-n 8 --dist worksteal)
signal=INT # so that pytest still says what failed
part tests 110 "$python" -m pytest -q -rf -m "not slow" --tb=short --maxfail=40 "${parallel[@]}" -p no:cacheprovider \
    tests/kernels/test_triton_codes.py tests/kernels/test_triton_linear.py tests/kernels/test_models_on_a_gpu.py \
    tests/kernels/test_triton_prefill.py \
    tests/ops/fusing/test_fusing.py tests/kernels/test_triton_decode.py tests/kernels/test_graphs_on_a_gpu.py
signal=TERM
[ ${#compiling[@]} -eq 0 ] || wait "${compiling[@]}"
for each in "$scratch"/*.log; do
    [ -e "$each" ] || continue
    echo "== compiled beside the tests: $(basename "$each" .log)"
    cat "$each"
done >>"$log"
part linear 60 "$python" -m benchmarks.linear_kernels --device "$device" --out "$OUT/gpu.jsonl" --shape "$large" \
    --rounds 4 --limit 45
decode padded 55 --shape "$shape" --systems stock exact --batch 8 --prompt "$long" --padded --tokens 17 --rounds 4 --limit 40
part kvcache 100 "$python" -m benchmarks.kvcache --device "$device" --out "$OUT/gpu.jsonl" --parts decode --shape "$shape" \
    --caches exact int8 int4 --contexts "$((4 * long))" "$((16 * long))" --rounds 4 --load-limit 60 --limit 30 --run-limit 8
part attention-decode 20 "$python" -m benchmarks.attention_decode --device "$device" --out "$OUT/gpu.jsonl" \
    --contexts "$((4 * long))" "$((16 * long))" "$((64 * long))"
part speculative 150 "$python" -m benchmarks.speculative --device "$device" --out "$OUT/gpu.jsonl" --shape "$large" \
    --parts held --held-prompts 2 --new 64 --rounds 3 --limit 60
part ngram 150 "$python" -m benchmarks.speculative --device "$device" --out "$OUT/gpu.jsonl" --parts generate \
    --tasks editing unpredictable --systems stock stock-lookup exact ngram --batches 1 --prompts 6 --rounds 3 --limit 60
part octocoder 60 "$python" -m benchmarks.octocoder --device "$device" --out "$OUT/gpu.jsonl" ${layers:+--layers "$layers"}
decode decode 55 --shape "$shape" --systems stock exact int4 --rounds 4 --limit 40
decode decode-large 50 --shape "$large" --systems stock exact --rounds 4 --limit 60
for how in "" "--apart" "--quantize int4"; do
    part "graphs${how:+ $how}" 40 "$python" -m benchmarks.graphs --device "$device" --out "$OUT/gpu.jsonl" \
        --shape "$shape" --rounds 20 --widths 1 2 8 $how
    part "graphs-large${how:+ $how}" 50 "$python" -m benchmarks.graphs --device "$device" --out "$OUT/gpu.jsonl" \
        --shape "$large" --prompt "$long" --rounds 10 --widths 1 8 $how
done
part attention 24 "$python" -m benchmarks.attention_kernels --device "$device" --out "$OUT/gpu.jsonl" \
    --backends torch triton flash-attn --length "$((8 * long))" --rounds 5 --limit 20

echo "== summary (rows in gpu.jsonl, all output in gpu.log)" | tee -a "$log"
printf '%s\n' "${summary[@]}" | tee -a "$log"
[ ! -s "$OUT/gpu.jsonl" ] || "$python" -m benchmarks.table "$OUT/gpu.jsonl"
case "${summary[*]}" in *FAIL* | *TIME*) exit 1 ;; esac
