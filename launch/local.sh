#!/usr/bin/env bash
# A job of several hosts on this machine: N processes, each with M fake CPU devices, joined as on a pod.
#
#   launch/local.sh [--logs DIR] [--restarts R] N M train CONFIG ... --out RUN
#   launch/local.sh [--logs DIR] [--restarts R] N M generate RUN ... --out X_vqa.json
#
#   launch/local.sh 2 4 train quickstart --mesh.fsdp 8 --data.records quickstart/data/train.json \
#       --data.embeddings quickstart/tokens --model.tokenizer quickstart/tokenizer --out runs/q
#
# Process I writes DIR/I.log (default: jaxmed-logs), process 0 is shown too. When a process of `train` or of `generate --join` dies,
# all end, and what names the dead one is repeated; other processes of `generate` are independent, and go on. Asked to end (SIGTERM, Ctrl-C), all
# save at the same step. Exit code: 0; 2 or 1 for what a person must mend; 75 where the same command goes on, which it does by itself
# up to R times. JAXMED names the program (default: jaxmed).
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

GRACE=${GRACE:-60} # seconds: the runtime notices a lost peer within 50

usage() {
  sed -n '2,/^set/{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
  exit 2
}

logs=jaxmed-logs restarts=0
while [[ ${1:-} == --* ]]; do
  [[ $# -ge 2 ]] || usage
  case $1 in
    --logs) logs=$2 ;;
    --restarts) restarts=$2 ;;
    *) usage ;;
  esac
  shift 2
done
[[ $# -ge 3 && $1 =~ ^[1-9][0-9]*$ && $2 =~ ^[1-9][0-9]*$ && $restarts =~ ^[0-9]+$ ]] || usage
[[ $3 == train || $3 == generate ]] || usage
processes=$1 devices=$2
shift 2
read -ra program <<<"${JAXMED:-jaxmed}"
mkdir -p "$logs"

say() { echo "local.sh: $*" >&2; }

free_port() {
  local port
  while port=$((20000 + RANDOM % 12000)); do
    (exec 3<>"/dev/tcp/localhost/$port") 2>/dev/null || break # nobody answers
  done
  echo "$port"
}

start() {
  local port i share=() apart=""
  together "$@" || apart=1
  port=$(free_port)
  pids=() codes=()
  for ((i = 0; i < processes; i++)); do
    if [[ -n $apart ]]; then share=(--process "$i" --processes "$processes"); fi
    : >"$logs/$i.log"
    JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices" \
      JAX_COORDINATOR_ADDRESS="localhost:$port" JAX_NUM_PROCESSES="$processes" JAX_PROCESS_ID="$i" PYTHONUNBUFFERED=1 \
      "${program[@]}" "$@" "${share[@]}" >"$logs/$i.log" 2>&1 &
    pids[i]=$!
  done
  tail -n +1 -f "$logs/0.log" >&2 &
  voice=$!
}

signal_all() { # SIGNAL, to those that still run
  local i
  for i in "${!pids[@]}"; do
    [[ -n ${codes[i]:-} ]] || kill -s "$1" "${pids[i]}" 2>/dev/null || true
  done
}

signal_of() { # CODE
  if (($1 > 128)); then echo " (signal $(($1 - 128)))"; fi
}

asked_to_end="" voice=""
pids=() codes=()
end() { # the second time at once
  signal_all "$([[ -n $asked_to_end ]] && echo KILL || echo TERM)"
  asked_to_end=1
}
trap end TERM INT # children of a script ignore Ctrl-C
trap 'signal_all KILL; kill $voice 2>/dev/null || true' EXIT

follow() { # until all have ended; ARGUMENTS
  local i deadline=""
  while ((${#codes[@]} < processes)); do
    sleep 0.2 || true
    for i in "${!pids[@]}"; do
      if [[ -z ${codes[i]:-} ]] && ! kill -0 "${pids[i]}" 2>/dev/null; then
        codes[i]=0
        wait "${pids[i]}" || codes[i]=$?
        if ((codes[i] != 0)) && [[ -z $deadline ]]; then
          deadline=$((SECONDS + GRACE))
          say "process $i was the first to end, with code ${codes[i]}$(signal_of "${codes[i]}")"
        fi
      fi
    done
    if [[ -n $deadline ]] && ((SECONDS > deadline)) && together "$@"; then signal_all KILL; fi
  done
  sleep 0.2
  kill "$voice" 2>/dev/null || true
  wait "$voice" 2>/dev/null || true
  voice=""
}

before=""
while true; do
  start "$@"
  follow "$@"
  code=$(verdict "${codes[@]}")
  ((code != 0)) || exit 0
  say "the processes ended with codes ${codes[*]}:"
  why "$logs"/*.log >&2
  now=$(progress "$@")
  if ((code != REQUEUE || restarts == 0)) || [[ -n $asked_to_end ]]; then exit "$code"; fi
  restarts=$((restarts - 1))
  say "starting again (${now:-nothing} done, ${before:-nothing} before)"
  before=$now
done
