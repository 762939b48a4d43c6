"""How tests are shared out among the workers of pytest-xdist (`--dist loadfile`).

A file is one worker's, as its fixtures are made once. Files that say within how many seconds
something happens are together one worker's, so that no two of them run at once. What takes long
begins first, so that no worker is left alone with it at the end.
"""

from xdist.scheduler import LoadFileScheduling

TIMED = (
    "tests/end_to_end/two_nodes/test_ends.py",
    "tests/end_to_end/two_nodes/test_refusals.py",
    "tests/end_to_end/test_server.py",
    "tests/core/cluster/processes/test_supervisor.py",
    "tests/core/cluster/processes/test_supervisor_failures.py",
    "tests/core/cluster/processes/test_supervisor_nodes.py",
    "tests/core/cluster/nodes/test_group.py",
    "tests/core/cluster/nodes/test_meeting.py",
    "tests/core/cluster/nodes/test_node_links.py",
    "tests/core/serve/test_process.py",
)
FIRST = ("tests/end_to_end/", "tests/packaging/", "tests/contracts/", "tests/benchmarks/")


def place(path: str) -> int:
    """Where a file stands in the order, the first being 0."""
    if path in TIMED:
        return 0
    folders = [index for index, folder in enumerate(FIRST, 1) if path.startswith(folder)]
    return folders[0] if folders else len(FIRST) + 1


class FilesInOrder(LoadFileScheduling):
    """xdist's scheduler of files, with the rules above."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return "timed" if path in TIMED else path
