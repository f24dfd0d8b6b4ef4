#!/usr/bin/env bash
# Replicas of `kvpleat serve` on one machine, a GPU each, behind vllm-router: one address for clients. See README.md.
# Flags given to this script go to every replica's vLLM. Ends with the router, and takes the replicas along.
set -euo pipefail

MODEL=${MODEL:-smollm2-135m}
RATIO=${RATIO:-4}
REPLICAS=${REPLICAS:-2}
PORT=${PORT:-8000}              # clients speak to this one
FIRST_PORT=${FIRST_PORT:-8100}  # replicas listen on this one and those after it
METRICS_PORT=${METRICS_PORT:-29000}

trap 'kill $(jobs -p) 2>/dev/null' EXIT
trap exit INT TERM

urls=()
for ((i = 0; i < REPLICAS; i++)); do
    CUDA_VISIBLE_DEVICES=$i kvpleat serve "$MODEL" --policy dms --ratio "$RATIO" -- \
        --host 127.0.0.1 --port $((FIRST_PORT + i)) "$@" &
    urls+=("http://127.0.0.1:$((FIRST_PORT + i))")
done

vllm-router --host 127.0.0.1 --port "$PORT" --policy round_robin --worker-urls "${urls[@]}" \
    --worker-startup-timeout-secs 1200 --worker-startup-check-interval 5 --health-check-interval-secs 5 --prometheus-port "$METRICS_PORT" &
wait $!
