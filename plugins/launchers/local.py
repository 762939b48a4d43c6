"""Every rank on this machine, and a refusal of settings that ask for more machines."""

from core.errors import ConfigError
from core.interfaces.launcher import Site
from core.settings.config import AppConfig
from plugins.launchers._node import NodeLauncher, NodeOptions


def make_launcher(options: NodeOptions, config: AppConfig) -> NodeLauncher:
    """The factory behind launch=local. Raises ConfigError for settings of several nodes."""
    launch = config.launch
    problems = []
    if launch.nnodes != 1:
        problems.append(f"launch.nnodes={launch.nnodes}")
    if launch.dist_init_addr is not None:
        problems.append(f"launch.dist_init_addr={launch.dist_init_addr}")
    if problems:
        raise ConfigError(
            f"{' and '.join(problems)}: launch=local starts every rank on this machine; leave it "
            "out, or choose a launcher for several nodes with launch=static (the default)"
        )
    return NodeLauncher(Site(), options, config)
