"""A stand-in for `python -m core.run` on one node: says how it was started, then does what it was
told by words `fake.NAME=VALUE`. Launchers that start nodes elsewhere are tested with it."""

import json
import os
import signal
import sys
from pathlib import Path


def main() -> int:
    words = sys.argv[1:]
    told = dict(word.removeprefix("fake.").split("=", 1) for word in words if "fake." in word)
    node_rank = next((w.split("=")[1] for w in words if w.startswith("launch.node_rank=")), "0")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # kept until sigwait takes it
    record = {
        "words": words,
        "token": os.environ.get("NODEWEAVE_CLUSTER_TOKEN"),
        "folder": os.getcwd(),
        "pid": os.getpid(),
        "parent": os.getppid(),
    }
    target = Path(told["out"]) / f"{node_rank}.json"
    target.with_suffix(".part").write_text(json.dumps(record))
    target.with_suffix(".part").rename(target)
    print(f"node {node_rank} is up", flush=True)
    if told.get("ends") in (node_rank, "all"):
        print(f"node {node_rank} has had enough", flush=True)
        return int(told["status"])
    signal.sigwait({signal.SIGTERM})
    print(f"node {node_rank} was asked to end", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
