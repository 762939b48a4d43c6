#!/usr/bin/env bash
# Two nodes on one machine, to see several nodes at work without several machines or GPUs: network
# namespaces joined by a link, 8 CPU ranks in each, the same command in both, one question over HTTP.
#
#   sudo examples/two_nodes.sh                    (PYTHON=.venv/bin/python, or python3)
#   examples/two_nodes.sh                         without root: both nodes on the loopback interface
#   examples/two_nodes.sh +model=qwen3_moe_tiny parallel=tp4_ep4
#
# Arguments replace the model and the plan; KEEP=1 leaves both nodes running until Ctrl-C.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
[ $# -gt 0 ] || set -- +model=deepseek_v3_tiny parallel=tp16_ep16_dp16
NAMES=("nodeweave0-$$" "nodeweave1-$$")
SCRATCH=$(mktemp -d)
PIDS=()

say() { printf '\n== %s\n' "$*"; }

clean_up() {
  [ ${#PIDS[@]} -eq 0 ] || kill "${PIDS[@]}" 2>/dev/null || true
  wait
  for name in "${NAMES[@]}"; do ip netns del "$name" 2>/dev/null || true; done
  rm -rf "$SCRATCH"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

# The network: each namespace has its own interfaces, as a machine has.
if [ "$(id -u)" -eq 0 ] && command -v ip >/dev/null && ip netns add "${NAMES[0]}" 2>/dev/null; then
  ip netns add "${NAMES[1]}"
  ip link add veth0 netns "${NAMES[0]}" type veth peer name veth0 netns "${NAMES[1]}"
  for node in 0 1; do
    ip -n "${NAMES[$node]}" addr add "10.98.0.$((node + 1))/24" dev veth0
    ip -n "${NAMES[$node]}" link set veth0 up
    ip -n "${NAMES[$node]}" link set lo up
  done
  ADDRESS=10.98.0.1
  ON_NODE_0=(ip netns exec "${NAMES[0]}")
  ON_NODE_1=(ip netns exec "${NAMES[1]}")
  say "two network namespaces: node 0 is 10.98.0.1, node 1 is 10.98.0.2"
else
  ADDRESS=127.0.0.1
  ON_NODE_0=(env)
  ON_NODE_1=(env)
  say "no network namespaces here (they need root and iproute2): both nodes use 127.0.0.1"
fi

# The token: the same file on every node, for its owner's eyes only.
(umask 077; "$PYTHON" -c 'import secrets; print(secrets.token_hex(32))' >"$SCRATCH/token")

COMMAND=("$PYTHON" -m core.run "$@" launch.nnodes=2 launch.dist_init_addr="$ADDRESS:20000"
  cluster.token_file="$SCRATCH/token")

say "the same command on both: $*"
"${ON_NODE_1[@]}" "${COMMAND[@]}" launch.node_rank=1 > >(sed -u 's/^/[node 1] /') 2>&1 &
PIDS+=($!)
"${ON_NODE_0[@]}" "${COMMAND[@]}" launch.node_rank=0 \
  > >(tee "$SCRATCH/node0" | sed -u 's/^/[node 0] /') 2>&1 &
PIDS+=($!)

until grep -qs 'curl ' "$SCRATCH/node0"; do
  for pid in "${PIDS[@]}"; do
    kill -0 "$pid" 2>/dev/null || { say "a node ended; it said why"; exit 1; }
  done
  sleep 0.2
done
URL=$(sed -n 's/.*URL *\(http[^ ]*\).*/\1/p' "$SCRATCH/node0")
MODEL=$(sed -n 's/.*"model": "\([^"]*\)".*/\1/p' "$SCRATCH/node0")

say "a question to node 0 (the tiny models have random weights, and answer accordingly)"
"${ON_NODE_0[@]}" curl -sS "$URL/v1/chat/completions" -H 'Content-Type: application/json' \
  -d "{\"model\": \"$MODEL\", \"messages\": [{\"role\": \"user\", \"content\": \"What is the capital of France?\"}], \"max_tokens\": 16, \"temperature\": 0}"
echo

if [ -n "${KEEP:-}" ]; then
  say "both run until Ctrl-C; from another terminal: ${ON_NODE_0[*]} curl $URL/v1/models"
  wait "${PIDS[@]}"
fi

say "SIGTERM to node 1 ends both, with status 0"
kill "${PIDS[0]}"
STATUS=0
for pid in "${PIDS[@]}"; do wait "$pid" || STATUS=$?; done
PIDS=()
say "ended with status $STATUS"
exit "$STATUS"
