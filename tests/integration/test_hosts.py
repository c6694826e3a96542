"""The wires between pretended hosts carry, delay, lose and break as they are told."""

import subprocess
import sys

import pytest

from tests import namespaces
from tests.hosts import hosts

pytestmark = pytest.mark.integration
ECHO = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.bind(("0.0.0.0", 7))
    print("up", flush=True)
    while True:
        data, peer = s.recvfrom(99)
        s.sendto(data, peer)
"""
ASK = """
import socket, statistics, sys, time
seconds = []
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.settimeout(float(sys.argv[2]))
    for number in range(20):
        began = time.monotonic()
        s.sendto(bytes([number]), (sys.argv[1], 7))
        try:
            while s.recv(99) != bytes([number]):
                pass
            seconds.append(time.monotonic() - began)
        except TimeoutError:
            pass
print(len(seconds), statistics.median(seconds or [0]))
"""


@pytest.mark.skipif(not namespaces.possible(), reason="namespaces are for root with unshare, ip and mount")
def test_wire_carries_delays_loses_and_breaks(tmp_path):
    with hosts(2, tmp_path) as lan:
        server = subprocess.Popen(lan.command(1, [sys.executable, "-c", ECHO]), stdout=subprocess.PIPE)
        assert server.stdout is not None
        server.stdout.readline()

        def ask(wait_s: float = 1.0) -> tuple[int, float]:
            command = lan.command(0, [sys.executable, "-c", ASK, lan.address(1), str(wait_s)])
            done = subprocess.run(command, stdout=-1, check=True)
            answered, seconds = done.stdout.split()
            return int(answered), float(seconds)

        assert ask()[0] == 20
        lan.set_wire(1, latency_s=0.04)
        assert ask()[1] >= 0.08
        lan.set_wire(1, loss=0.3)
        assert 0 < ask(0.1)[0] < 20
        assert lan.wires[1].lost > 0
        lan.set_wire(1, cut=True)
        assert ask(0.1)[0] == 0
        lan.set_wire(1)
        assert ask()[0] == 20
        lan.kill(1)
        assert ask(0.1)[0] == 0
        server.wait(10)
