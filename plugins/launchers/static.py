"""Nodes that are told their place: the same command on each, with another `launch.node_rank`.

With one node (the default) it starts every rank on this machine.
"""

from core.errors import ConfigError
from core.interfaces.launcher import Site
from core.settings.config import AppConfig
from plugins.launchers._node import NodeLauncher, NodeOptions


def make_launcher(options: NodeOptions, config: AppConfig) -> NodeLauncher:
    """The factory behind launch=static. Raises ConfigError where node 0's address is missing."""
    launch = config.launch
    if launch.nnodes == 1:
        if launch.dist_init_addr is not None:
            raise ConfigError(
                f"launch.dist_init_addr={launch.dist_init_addr} is where several nodes meet, and "
                "launch.nnodes=1; set launch.nnodes, or leave it out"
            )
        return NodeLauncher(Site(), options, config)
    if launch.dist_init_addr is None:
        raise ConfigError(
            f"launch.nnodes={launch.nnodes} needs launch.dist_init_addr=HOST:PORT of node 0"
        )
    site = Site(nnodes=launch.nnodes, node_rank=launch.node_rank, rendezvous=launch.dist_init_addr)
    return NodeLauncher(site, options, config)
