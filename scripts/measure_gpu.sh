#!/bin/bash
# Every measurement and test that needs a GPU, in one go: for docs/performance.md.
#
#     scripts/measure_gpu.sh OUT [load] [moe] [step] [engine] [tests] [sanitize] [ranks]
#
# OUT: a folder for logs and JSON. Without parts: all. Each command has a limit of its own, and one that
# fails does not end the others; the exit code is the number of those that did. Needs tpx's packages
# installed, or runs from the source tree; a checkpoint of gpt-oss-20b's shapes is written to /tmp.
#
# ranks: a rank on each GPU, where there are 2 or 4; all else runs on one. First what is right (tests,
# the same greedy tokens by several plans), then what is fast.
set -u
cd "$(dirname "$0")/.."
out=${1:?a folder for what is measured} && shift
mkdir -p "$out"
gpus=$(nvidia-smi -L | wc -l)
several=$([ "$gpus" -gt 1 ] && echo ranks)
parts=${*:-load moe step engine tests sanitize $several}
model=/tmp/tpx-gpt-oss-20b
moe=kernels/tpx-moe attention=kernels/tpx-attention
export PYTHONUNBUFFERED=1
# Warm caches are Python's own, too, which some images keep from being written.
export PYTHONPYCACHEPREFIX=/tmp/tpx-pycache PYTHONDONTWRITEBYTECODE=
export PYTHONPATH=$PWD:$PWD/tests:$PWD/scripts:$PWD/$moe/torch-ext:$PWD/$attention/torch-ext:$PWD/$moe/tests:$PWD/$attention/tests
failed=0

run() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 begin=$SECONDS code=0
    shift 2
    timeout -k 10 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
    [ "$code" = 0 ] || failed=$((failed + 1))
    echo "$name: exit code $code, $((SECONDS - begin)) s"
    tail -n 12 "$out/$name.log"
}

tests() { python3 -m pytest -q -p no:benchmark -c /dev/null --rootdir=. -m gpu "$@"; }
export -f tests
sanitized() { compute-sanitizer --error-exitcode 9 python3 -m pytest -q -p no:benchmark -c /dev/null --rootdir=. -m gpu "$@"; }
export -f sanitized

fit='
import sys, torch, tpx
share = 16 * 2**30 / torch.cuda.get_device_properties(0).total_memory
with tpx.LLM(sys.argv[1], context=4096, batch=1, memory_fraction=share) as llm:
    params = tpx.SamplingParams(max_tokens=1000, ignore_eos=True)
    [done] = llm.generate([list(range(3000))], params)
    free, total = torch.cuda.mem_get_info()
    print(f"{len(done.token_ids)} tokens after 3000, in {(total - free) / 2**30:.2f} GiB of device memory")
'

prompts='
import json, random
draw = random.Random(1)
for length in (1, 24, 128):
    ids = [draw.randrange(200000) for _ in range(length)]
    print(json.dumps({"prompt": ids, "max_tokens": 96, "ignore_eos": True}))
'

# Sums that are added in another order round to other bits of bfloat16, so texts part at some token.
same='
import json, pathlib, sys
found = {}
for plan in sys.argv[2:]:
    path = pathlib.Path(sys.argv[1], f"greedy-{plan}.jsonl")
    lines = [json.loads(line) for line in path.open()] if path.exists() else []
    found[plan] = {line["id"]: line["completions"][0]["token_ids"] for line in lines}
    print(plan, *(found[plan][name][:16] for name in sorted(found[plan])), sep="\n    ")
one = found[sys.argv[2]]
for plan, tokens in found.items():
    alike = [[a == b for a, b in zip(tokens[n], one[n])] for n in sorted(tokens.keys() & one.keys())]
    print(f"{plan}: alike up to token", *((*each, False).index(False) for each in alike))
'

# Greedy continuations, with the sizes that `bench latency` gives its engine: one compiles for both.
greedy() { # RANKS PLAN
    run "greedy-$2" 120 python3 -m tpx generate --nproc "$1" --model $model --tp-plan "$2" --context 256 --batch 16 \
        --run-dir "$out/run-$2" --hang-timeout 30 --restart --input "$out/prompts.jsonl" --output "$out/greedy-$2.jsonl"
}

latency() { # RANKS PLAN GRAPHS
    run "latency-$2" 120 python3 -m tpx bench latency --nproc "$1" --model $model --tp-plan "$2" --input-len 128 \
        --output-len 128 --batch 1,16 --graphs "$3"
}

ranks() {
    local plan plans="tp$gpus tp$gpus-ep$gpus auto"
    export NCCL_DEBUG=WARN
    run doctor 60 python3 -m tpx doctor --ranks "$gpus"
    run rank_tests 420 bash -c 'tests -s --durations 0 tests/gpu/test_gpu_ranks.py'
    python3 -c "$prompts" >"$out/prompts.jsonl"
    greedy 1 tp1
    for plan in $plans; do greedy "$gpus" "$plan"; done
    run same 20 python3 -c "$same" "$out" tp1 $plans
    latency "$gpus" "tp$gpus" both
    latency "$gpus" "tp$gpus-ep$gpus" both
    latency 1 tp1 on
    run links 60 python3 -m tpx bench links --nproc "$gpus"
    latency "$gpus" auto on # by the links as measured
    run rank_load 90 python3 -m tpx bench load --nproc "$gpus" --tp-plan "tp$gpus-ep$gpus" --model $model
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
[ -e $model/config.json ] || run checkpoint 120 python3 scripts/make_checkpoint.py --size 20b --out $model
for part in $parts; do
    case $part in
    load)
        run load_tests 120 bash -c 'tests tests/gpu/test_gpu_load.py tests/gpu/test_gpu_exchange.py'
        run load 90 python3 scripts/bench_load.py --cuda $model --runs 5
        ;;
    moe)
        run moe_tests 150 bash -c "tests -n 14 $moe/tests/test_moe_gpu.py"
        run moe 150 python3 $moe/benchmarks/bench_moe.py --out "$out/moe.json"
        ;;
    step) run step 120 python3 scripts/bench_step.py $model --profile ;;
    engine)
        run cold 120 env TORCH_HOME=/tmp/tpx-cold TRITON_CACHE_DIR=/tmp/tpx-cold/triton python3 -m tpx bench load --model $model --rounds 1
        run start 120 python3 -m tpx bench load --model $model --json
        run fit 120 python3 -c "$fit" $model
        run latency 150 python3 -m tpx bench latency --model $model --input-len 128 --output-len 256 --batch 1,4,16
        run long 120 python3 -m tpx bench latency --model $model --input-len 4096 --output-len 256 --batch 1
        run requests64 120 python3 -m tpx bench throughput --model $model --requests 64 --input-len 512 --output-len 256 --prefix-cache off
        run requests256 120 python3 -m tpx bench throughput --model $model --requests 256 --input-len 512 --output-len 256 --prefix-cache off
        ;;
    tests)
        run engine_tests 200 bash -c 'tests tests/gpu/test_gpu_model.py tests/gpu/test_gpu_engine.py tests/gpu/test_gpu_llm.py'
        run attention_tests 200 bash -c "tests -n 8 $attention/tests/test_attention_gpu.py"
        ;;
    sanitize)
        if command -v compute-sanitizer >/dev/null; then
            run sanitize_moe 150 bash -c "sanitized $moe/tests/test_moe_gpu.py -k 'uneven or elsewhere'"
            run sanitize_attention 150 bash -c "sanitized $attention/tests/test_attention_gpu.py -k '1001-700-5 or new_token or rope_write or mixed or sample'"
        else
            echo "sanitize: there is no compute-sanitizer here"
        fi
        ;;
    ranks)
        if [ "$gpus" -gt 1 ]; then
            ranks
        else
            echo "ranks: there are no two GPUs here"
        fi
        ;;
    *) echo "no part is called $part" >&2 && exit 2 ;;
    esac
done
exit $failed
