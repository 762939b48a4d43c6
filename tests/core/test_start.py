"""What a node settles before it starts anything."""

import io

from core.cluster.processes.display import Display
from core.cluster.processes.group import SingleNode
from core.interfaces.launcher import Site
from core.plugin.plugin_manager import PluginManager
from core.settings.compose import compose, parse_overrides
from core.start import prepare


class SecondOfTwo(SingleNode):
    """A node that a batch system told its place; the user said nothing of several nodes."""

    def __init__(self):
        self.site = Site(nnodes=2, node_rank=1, rendezvous="10.0.0.1:20000")

    def placements(self, plan, machine):
        return []


def test_what_the_launcher_found_is_what_plugins_read(tiny_llama_folder):
    words = ["+model=custom", f"model.path={tiny_llama_folder}", "engine.device=cpu"]
    plugins = PluginManager.load()
    node = SecondOfTwo()
    config = compose(parse_overrides(words), plugins.config_searchpath(), plugins.sections)
    settled = prepare(config, plugins, node, node, Display(stderr=io.StringIO())).resolved.config
    assert (config.launch.nnodes, settled.launch.nnodes, settled.launch.node_rank) == (1, 2, 1)
    assert plugins.default_backend("comm", "cuda", config) == "symm_mem"  # of one host alone
    assert plugins.default_backend("comm", "cuda", settled) == "nccl"
