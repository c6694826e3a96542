"""Ray Train's process group on the network that Ray itself uses.

Gloo listens where the host's own name resolves to. On many machines that is the loopback (Debian writes `127.0.1.1`
into `/etc/hosts`), and workers of two hosts then never meet: "Gloo connectFullMesh failed". So each worker first names
the interface of its node's address. Variables that are set already stay.
"""

import os
from dataclasses import dataclass
from typing import Any

import psutil
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.util import get_node_ip_address


@dataclass
class ProcessGroup(TorchConfig):
    """Ray's `TorchConfig`; the workers agree on the nodes' own network."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _OnTheNodesNetwork


class _OnTheNodesNetwork(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(name_interface)
        super().on_start(worker_group, backend_config)


def name_interface() -> None:
    """Names the network interface of this node's address for Gloo and NCCL."""
    if (name := interface_of(get_node_ip_address())) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def interface_of(address: str) -> str | None:
    """The network interface of this machine with an address."""
    for name, found in psutil.net_if_addrs().items():
        if any(item.address == address for item in found):
            return name
    return None
