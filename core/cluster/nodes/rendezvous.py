"""How the nodes of an engine find each other: node 0 listens, the others come to it."""

from core.cluster.nodes.lead import Lead
from core.cluster.nodes.member import Member, reach
from core.cluster.nodes.network import interface_of, listen, own_address
from core.cluster.nodes.node_links import NodeLinks
from core.cluster.nodes.secret import load_keys
from core.cluster.processes.display import Display
from core.cluster.processes.group import Group, SingleNode
from core.errors import ConfigError
from core.interfaces.launcher import Site
from core.settings.address import join_address, split_address
from core.settings.config import AppConfig


def meet(site: Site, config: AppConfig, display: Display) -> Group:
    """This node's side of the group. Node 0 returns at once and takes the others in later (in
    `Group.agree`); another node returns when it reached node 0.

    Raises ConfigError or ResourceError for what is wrong with the address, the port or the token.
    """
    if site.nnodes == 1:
        return SingleNode()
    if site.rendezvous is None:
        raise ConfigError(
            f"launch.nnodes={site.nnodes} needs launch.dist_init_addr=HOST:PORT of node 0"
        )
    host, port = split_address(site.rendezvous)
    keys = load_keys(config.cluster)
    cluster = config.cluster
    if site.node_rank == 0:
        address = own_address(host)
        listener = listen(address, port, "the other nodes")
        links = _links(config, keys.link)
        display.note(
            f"node 0 of {site.nnodes} listens at {join_address(address, port)}, "
            f"interface {interface_of(address)}"
        )
        return Lead(
            site,
            listener,
            links,
            cluster,
            config.launch,
            wire_key=keys.wire,
            note=display.note,
            waiting=display.waiting,
        )
    link = reach(host, port, keys.link, cluster.join_timeout_s, display.waiting)
    display.note(
        f"node {site.node_rank} of {site.nnodes} reached node 0 at {link.peer} from "
        f"{link.own_address}, interface {interface_of(link.own_address)}"
    )
    return Member(site, _links(config, keys.link), link, wire_key=keys.wire)


def _links(config: AppConfig, key: bytes) -> NodeLinks:
    cluster = config.cluster
    return NodeLinks(
        interval_s=cluster.heartbeat_interval_s, timeout_s=cluster.heartbeat_timeout_s, key=key
    )
