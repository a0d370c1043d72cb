#!/bin/bash
# What runs on each worker of a slice. Copied there and called by experiments/tpu:
#   setup [BUCKET]                    token, code, Python, packages, mount
#   launch WORKDIR ARGUMENTS...       experiments.run, detached; nothing if it is running
#   poll                              one line: bare, idle, running, exited STATUS, or lost
#   log WORKDIR FIRST_LINE            what is saved, and the log from that line on
#   stop                              SIGTERM, which saves; SIGKILL after a minute
# All is under the home directory but the mount. A run is going on for as long as someone holds $JOB/lock.
set -u -o pipefail
JOB=$HOME/rlhf_jax_job
CODE=$HOME/rlhf_jax
VENV=$HOME/rlhf_jax_venv
MOUNT=/mnt/rlhf_jax
PATH=$HOME/.local/bin:$PATH

fail() { echo "error: $2" >&2; exit "$1"; }

worker() {
  curl -sf -m 5 -H 'Metadata-Flavor: Google' \
    http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number || echo "?"
}

running() { [ -e "$JOB/lock" ] && ! flock -s -n "$JOB/lock" true; }

repeatedly() {  # apt is busy in the first minutes of a machine
  for _ in 1 2 3 4 5 6; do "$@" && return 0; sleep 20; done
  return 1
}

install_gcsfuse() {
  command -v gcsfuse >/dev/null && return 0
  local key=/usr/share/keyrings/cloud.google.asc
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee $key >/dev/null &&
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null &&
    repeatedly sudo apt-get -qq update && repeatedly sudo apt-get -qq install -y gcsfuse >/dev/null
}

mount_bucket() {
  local bucket; bucket=$(cat "$JOB/bucket" 2>/dev/null)
  if [ -z "$bucket" ] || mountpoint -q "$MOUNT"; then return 0; fi
  install_gcsfuse || fail 74 "gcsfuse could not be installed on worker $(worker)"
  sudo mkdir -p "$MOUNT" && sudo chown "$(id -u):$(id -g)" "$MOUNT"
  # No metadata is cached: a file of one worker is there for the others at once. Renaming of directories is what makes
  # a checkpoint whole; it is atomic in a bucket with hierarchical namespace, and allowed at all in a flat one.
  gcsfuse --implicit-dirs --rename-dir-limit=1000000 --metadata-cache-ttl-secs=0 \
    --metadata-cache-negative-ttl-secs=0 "$bucket" "$MOUNT" >/dev/null ||
    fail 74 "bucket $bucket could not be mounted on worker $(worker); does the service account of the TPU have the role Storage Object User on it?"
}

setup() {
  running && fail 2 "a run is going on on worker $(worker); stop it first"
  mkdir -p "$JOB" && rm -f "$JOB"/ready "$JOB"/started "$JOB"/status
  if [ -e "$HOME/.rlhf_jax_token" ]; then
    mkdir -p -m 700 "$HOME/.cache/huggingface"
    chmod 600 "$HOME/.rlhf_jax_token" && mv "$HOME/.rlhf_jax_token" "$HOME/.cache/huggingface/token"
  fi
  rm -rf "$CODE" && mkdir -p "$CODE" && tar -xzf "$HOME/rlhf_jax.tar.gz" -C "$CODE" || fail 70 "the code could not be unpacked"
  command -v uv >/dev/null || python3 -m pip install -q --user uv 2>/dev/null ||
    curl -LsSf https://astral.sh/uv/install.sh | sh >/dev/null || fail 70 "uv could not be installed"
  # The Python of the image may be 3.10.
  [ -x "$VENV/bin/python" ] || uv venv -q --python 3.11 "$VENV" || fail 70 "no Python 3.11 could be had"
  uv pip install -q --python "$VENV/bin/python" -e "$CODE[tpu]" || fail 70 "the packages could not be installed"
  printf %s "${1:-}" >"$JOB/bucket"
  mount_bucket
  touch "$JOB/ready"
  echo "@rlhf_jax $(worker) set up"
}

launch() {
  [ -e "$JOB/ready" ] || fail 2 "worker $(worker) is not set up"
  local workdir=$1; shift
  exec 8>"$JOB/lock"
  flock -w 2 8 || { echo "@rlhf_jax $(worker) running"; return 0; }
  mount_bucket 8>&-  # gcsfuse goes on in the background and must not hold the lock
  mkdir -p "$workdir" || fail 74 "$workdir cannot be made a directory on worker $(worker)"
  rm -f "$JOB/status" "$JOB/pid" /tmp/libtpu_lockfile  # the latter is left behind by a run that was killed
  date >"$JOB/started"
  # Descriptor 8, and with it the lock, goes on to the process that waits and to the run.
  setsid bash "$0" wait "$workdir" "$@" </dev/null >>"$JOB/wait.log" 2>&1 &
  echo "@rlhf_jax $(worker) launched"
}

wait_for() {
  local workdir=$1; shift
  cd "$CODE" || exit 1
  set -m  # the run gets a process group of its own
  "$VENV/bin/python" -u -m experiments.run "$@" >"$JOB/log" 2>&1 &
  echo $! >"$JOB/pid"
  wait $!
  echo $? >"$JOB/status.new" && mv "$JOB/status.new" "$JOB/status"
  # Beside the workdir: what is in it belongs to the run.
  mkdir -p "$workdir.logs" && cp "$JOB/log" "$workdir.logs/worker-$(worker)-$(date -u +%Y%m%dT%H%M%S).log"
}

poll() {
  local state=idle
  if [ ! -e "$JOB/ready" ]; then state=bare
  elif [ -e "$JOB/status" ]; then state="exited $(cat "$JOB/status")"
  elif running; then state=running
  elif [ -e "$JOB/started" ]; then state=lost; fi  # the machine was started anew
  echo "@rlhf_jax $(worker) $state"
}

log() {
  local file
  for file in "$1"/checkpoints/*/[0-9]*/meta/metadata "$1"/roles/*; do
    [ -e "$file" ] && file=${file#"$1"/} && echo "@rlhf_jax saved ${file%/meta/metadata}"
  done
  tail -n "+$2" "$JOB/log" 2>/dev/null | head -n 2000
  return 0
}

ends_within() {
  for _ in $(seq "$1"); do running || return 0; sleep 1; done
  ! running
}

stop() {
  running || return 0
  for _ in 1 2 3 4 5; do [ -e "$JOB/pid" ] && break; sleep 1; done  # launched just now
  local pid; pid=$(cat "$JOB/pid") || fail 76 "the run on worker $(worker) has not begun"
  if [ ! -e "$JOB/status" ]; then
    kill -TERM "$pid" 2>/dev/null
    ends_within "${STOP_SECONDS:-60}" && return 0
  elif ends_within 10; then return 0; fi  # it is ending
  kill -KILL -- "-$pid" 2>/dev/null
  ends_within 20 || fail 76 "the run on worker $(worker) does not end"
}

action=$1; shift
case $action in
  setup | launch | poll | log | stop) "$action" "$@" ;;
  wait) wait_for "$@" ;;
  *) fail 2 "worker.sh knows no action $action" ;;
esac
