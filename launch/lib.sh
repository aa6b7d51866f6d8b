# shellcheck shell=bash
# What the launch scripts share: reading the logs of a job, its exit code, its progress. Sourced, not run.

REQUEUE=75 # jaxmed: preempted, or lost its peers; started again, the job goes on

# why LOG...: for each log of a job that ended badly, the line that says most. The coordinator's line on tasks without heartbeats
# names the dead ones in the line below it; a process that was killed has no last words, and its log none either.
why() {
  local log lines
  for log in "$@"; do
    [[ -s $log ]] || { echo "  $log: is empty" && continue; }
    lines=$(grep -a -m 1 -A 1 'tasks are unhealthy' "$log" | tr '\n' ' ') || true
    # the rest of what the runtime prints when it aborts names nobody
    if [[ -z $lines ]] && grep -aq 'Failed to send RPC to coordination service' "$log"; then
      lines="lost process 0, which coordinates: its own log says more"
    fi
    [[ -n $lines ]] || lines=$(grep -av -e '^ *@ *0x' -e 'Check failure stack trace' -e '^ *$' "$log" | tail -n 1) || true
    echo "  $log: ${lines:0:400}"
  done
}

# verdict CODE...: one exit code for those of a job's processes. 2 and 1 are for a person to mend; 75, and deaths by a signal, are
# not; 130 is Ctrl-C.
verdict() {
  local code wanted worst=0
  for wanted in 2 1 130; do
    for code in "$@"; do
      if ((code == wanted)); then
        echo "$wanted"
        return
      fi
    done
  done
  for code in "$@"; do
    if ((code == REQUEUE || code >= 128)); then
      worst=$REQUEUE
    elif ((code != 0)); then
      worst=$code
      break
    fi
  done
  echo "$worst"
}

# together ARGUMENT...: whether the processes of a command are one job, which ends with the first of them.
together() {
  local argument
  [[ $1 != train ]] || return 0
  for argument in "$@"; do
    [[ $argument != --join ]] || return 0
  done
  return 1
}

# progress ARGUMENT...: how far a command has come, as one word; the same word after a restart means that nothing was gained.
progress() {
  local out="" previous="" argument
  for argument in "$@"; do
    case $argument in
      --out=*) out=${argument#--out=} ;;
      *) [[ $previous != --out ]] || out=$argument ;;
    esac
    previous=$argument
  done
  if [[ $1 == train ]]; then
    { find "$out/checkpoints" -mindepth 1 -maxdepth 1 -name '[0-9]*' -printf '%f\n' 2>/dev/null || true; } | sort -n | tail -n 1
  else
    { cat "$out.parts"/*.jsonl 2>/dev/null || true; } | wc -l
  fi
}
