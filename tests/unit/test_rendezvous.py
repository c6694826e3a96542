"""Workers meet on the network of their nodes."""

import socket

import psutil
import pytest

from cluster import rendezvous


def test_interface_is_the_one_with_the_address():
    for name, addresses in psutil.net_if_addrs().items():
        for item in addresses:
            if item.family == socket.AF_INET:
                found = rendezvous.interface_of(item.address)
                assert item.address in [other.address for other in psutil.net_if_addrs()[found]], name
    assert rendezvous.interface_of("203.0.113.77") is None


@pytest.mark.parametrize("given", [None, "eth7"])
def test_interface_is_named_for_gloo_and_nccl_unless_somebody_did(monkeypatch, given):
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    if given:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", given)
    monkeypatch.setattr(rendezvous, "get_node_ip_address", lambda: "127.0.0.1")
    rendezvous.name_interface()
    assert rendezvous.os.environ["GLOO_SOCKET_IFNAME"] == (given or "lo")
    assert rendezvous.os.environ["NCCL_SOCKET_IFNAME"] == "lo"


def test_interface_of_an_unknown_address_is_left_to_the_libraries(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(rendezvous, "get_node_ip_address", lambda: "203.0.113.77")
    rendezvous.name_interface()
    assert "GLOO_SOCKET_IFNAME" not in rendezvous.os.environ
