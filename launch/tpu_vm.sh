#!/usr/bin/env bash
# A Cloud TPU slice, all its hosts at once, through gcloud.
#
#   launch/tpu_vm.sh [OPTIONS] create              a slice of --type and --version (--spot: preemptible)
#   launch/tpu_vm.sh [OPTIONS] setup               this checkout to every host, and jaxmed[tpu] installed there
#   launch/tpu_vm.sh [OPTIONS] run ARGUMENTS       jaxmed ARGUMENTS on every host, started again after code 75
#   launch/tpu_vm.sh [OPTIONS] end                 SIGTERM to jaxmed on every host: all save at the same step
#   launch/tpu_vm.sh [OPTIONS] delete
#
#   --name NAME --zone ZONE [--project PROJECT] [--type v5p-32] [--version v2-alpha-tpuv5] [--spot] [--restarts 20]
#   --dry-run                                      print the commands and do nothing
#
#   launch/tpu_vm.sh --name n1 --zone us-east5-a run train btb3d --mesh.fsdp 8 --mesh.context 2 ... --out /shared/runs/btb3d
#
# Records, tokens, weights and --out lie on storage that every host mounts (Filestore, or a bucket through gcsfuse): jaxmed
# refuses an --out that some hosts don't see. The hosts find each other by the slice's metadata.
set -euo pipefail

usage() {
  sed -n '2,/^set/{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
  exit 2
}

name="" zone="" project="" type=v5p-32 version=v2-alpha-tpuv5 restarts=20 spot="" dry_run=""
while [[ ${1:-} == --* ]]; do
  case $1 in
    --dry-run) dry_run=1 && shift && continue ;;
    --spot) spot=--spot && shift && continue ;;
  esac
  [[ $# -ge 2 ]] || usage
  case $1 in
    --name) name=$2 ;;
    --zone) zone=$2 ;;
    --project) project=$2 ;;
    --type) type=$2 ;;
    --version) version=$2 ;;
    --restarts) restarts=$2 ;;
    *) usage ;;
  esac
  shift 2
done
[[ -n $name && -n $zone && $# -ge 1 && $restarts =~ ^[0-9]+$ ]] || usage
command=$1
shift

tpu() { # gcloud's sub-command and its arguments
  local line=(gcloud compute tpus tpu-vm "$1" "${@:2}" --zone "$zone")
  if [[ -n $project ]]; then line+=(--project "$project"); fi
  if [[ -n $dry_run ]]; then
    printf '%q ' "${line[@]}"
    echo
  else
    "${line[@]}"
  fi
}

everywhere() { # COMMAND, in a shell of every host
  tpu ssh "$name" --worker=all --command "$1"
}

case $command in
  create) tpu create "$name" --accelerator-type "$type" --version "$version" ${spot:+"$spot"} ;;
  setup)
    bundle=${TMPDIR:-/tmp}/jaxmed.tar.gz
    if [[ -z $dry_run ]]; then git -C "$(dirname "${BASH_SOURCE[0]}")/.." archive --format=tar.gz --output="$bundle" HEAD; fi
    tpu scp "$bundle" "$name:jaxmed.tar.gz" --worker=all
    # the images' own Python is older than 3.11
    everywhere 'mkdir -p jaxmed && tar -xzf jaxmed.tar.gz -C jaxmed && python3 -m pip install --user -q uv &&
      python3 -m uv venv -q --clear --python 3.12 jaxmed-venv &&
      python3 -m uv pip install -q --python jaxmed-venv/bin/python "./jaxmed[tpu]"'
    ;;
  run)
    # the hosts of a slice are one job, or its chips do not start
    [[ ${1:-} == train || (${1:-} == generate && " $* " == *" --join "*) ]] ||
      { echo "tpu_vm.sh: run takes train or generate --join, and its arguments" >&2 && exit 2; }
    printf -v arguments ' %q' "$@"
    # each host starts again by itself; they wait for each other for 50 s, and a host that is too early tries once more
    everywhere "rm -f jaxmed-end
    for attempt in \$(seq 0 $restarts); do
      jaxmed-venv/bin/jaxmed$arguments & echo \$! >jaxmed-pid
      code=0; wait \$! || code=\$?
      [ \$code -ne 0 ] || exit 0
      [ \$code -eq 75 ] || [ \$code -ge 128 ] || exit \$code
      [ ! -e jaxmed-end ] || exit \$code
      sleep 5
    done
    exit \$code"
    ;;
  end)
    # shellcheck disable=SC2016
    everywhere 'touch jaxmed-end && kill -TERM "$(cat jaxmed-pid)"'
    ;;
  delete) tpu delete "$name" --quiet ;;
  *) usage ;;
esac
