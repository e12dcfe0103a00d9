#!/bin/bash
# Two hosts that share a directory, as two network namespaces: convert and verify over TCP.
#   sudo tests/two_hosts.sh [DIRECTORY]
# Needs root, iproute2 and util-linux. Every line that it prints is something that held.
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
bin=$here/.venv/bin
folder=$(mktemp -d "${1:-/tmp}/two-hosts.XXXXXX")
export PYTHONPATH=$here OMP_NUM_THREADS=1

clean_up() {
  for host in host-a host-b; do
    ip netns pids "$host" 2>/dev/null | xargs -r kill -KILL || true
    ip netns delete "$host" 2>/dev/null || true
  done
  rm -rf "$folder"
}
trap clean_up EXIT

link_hosts() {
  ip netns add host-a
  ip netns add host-b
  ip link add veth-a netns host-a type veth peer name veth-b netns host-b
  local number=1 name
  for name in a b; do
    ip -n "host-$name" address add "10.77.0.$number/24" dev "veth-$name"
    ip -n "host-$name" link set "veth-$name" up
    ip -n "host-$name" link set lo up
    number=$((number + 1))
  done
}

# On a host with a name and mounts of its own: a setup, then torchrun with two ranks.
on_host() {
  local name=$1 number=$2 setup=$3
  shift 3
  ip netns exec "$name" unshare --uts --mount bash -c "hostname $name; $setup; exec \"\$@\"" - \
    "$bin/torchrun" --nnodes 2 --nproc-per-node 2 --node-rank "$number" \
    --master-addr 10.77.0.1 --master-port 29533 -m gptoss_convert "$@" \
    >"$folder/$name.out" 2>"$folder/$name.err"
}

# The same command on both hosts at once; fails if it fails on either.
on_both() {
  on_host host-a 0 true "$@" &
  local first=$!
  on_host host-b 1 true "$@" || true
  wait "$first" || { cat "$folder/host-a.err" "$folder/host-b.err"; return 1; }
}

held() { echo "held: $*"; }

link_hosts
cd "$folder"
"$bin/gptoss-convert" synth source --quiet

for to in "hf --dtype bf16" "openai" "megatron"; do
  read -ra words <<<"--to $to"
  "$bin/gptoss-convert" convert source expected "${words[@]}" --quiet
  on_both convert source target "${words[@]}"
  diff -r expected target
  held "--to $to: four ranks on two hosts write what one process writes"
  "$bin/gptoss-convert" verify source target --device cpu --quiet --json alone.json
  on_both verify source target --device cpu --json ranks.json
  "$bin/python" - <<'END'
import json
alone, ranks = (json.load(open(name)) for name in ("alone.json", "ranks.json"))
assert alone["same"] is ranks["same"] is True
END
  held "--to $to: four ranks on two hosts find both sides the same"
  rm -r expected target
done

# A rank of host-b is killed while all plan.
"$bin/gptoss-convert" convert source expected --to megatron --quiet
on_both convert source target --to megatron --rank-log logs & both=$!
until grep -qs process logs/rank-00003.log; do sleep 0.05; done
victim=$(sed -n 's/.*process \([0-9]*\):.*/\1/p' logs/rank-00003.log)
kill -KILL "$victim"
began=$SECONDS
if wait "$both" >/dev/null; then echo "the run went on without rank 3"; exit 1; fi
grep -q "error: rank 3 on host-b: ended without a word" host-a.err
held "a rank of host-b that is killed ends host-a with that reason, torchrun after $((SECONDS - began)) s"
on_both convert source target --to megatron
diff -r expected target
held "the same command goes on, and the bytes are the same"
rm -r expected target

# host-b sees another file system at the place of TARGET.
mkdir shared
on_host host-a 0 true convert source shared/target --to hf --dtype bf16 & first=$!
if on_host host-b 1 "mount -t tmpfs none shared" convert source shared/target --to hf --dtype bf16; then
  echo "a target that is not shared was accepted"; exit 1
fi
wait "$first" && exit 1
grep -h "^error: " host-a.err | sort -u
grep -q "does not see what rank 0 on host-a writes beside it" host-a.err
[ -z "$(ls -A shared)" ]
held "a target that the hosts do not share is refused, and nothing is left"
