"""The launchers `static` and `local`: the settings they take and refuse."""

import pytest

from core.errors import ConfigError
from core.interfaces.launcher import Site
from plugins.launchers import local, static
from plugins.launchers._node import NodeOptions


def test_one_node_needs_nothing(config_with):
    for module in (static, local):
        assert module.make_launcher(NodeOptions(), config_with()).site() == Site()


def test_static_takes_its_place_from_the_settings(config_with):
    config = config_with(nnodes=2, node_rank=1, dist_init_addr="10.0.0.1:20000")
    assert static.make_launcher(NodeOptions(), config).site() == Site(
        nnodes=2, node_rank=1, rendezvous="10.0.0.1:20000"
    )


def test_static_needs_the_address_with_several_nodes_only(config_with):
    with pytest.raises(ConfigError, match=r"launch\.nnodes=2 needs launch\.dist_init_addr=HOST"):
        static.make_launcher(NodeOptions(), config_with(nnodes=2))
    with pytest.raises(ConfigError, match=r"launch\.dist_init_addr=h:1 .* launch\.nnodes=1"):
        static.make_launcher(NodeOptions(), config_with(dist_init_addr="h:1"))


def test_local_refuses_several_nodes_with_both_keys(config_with):
    with pytest.raises(ConfigError) as caught:
        local.make_launcher(NodeOptions(), config_with(nnodes=2, dist_init_addr="10.0.0.1:20000"))
    assert str(caught.value).startswith(
        "launch.nnodes=2 and launch.dist_init_addr=10.0.0.1:20000: launch=local starts every rank"
    )
