"""Hosts on one machine, each with processes, an address and `/tmp/ray` of its own, joined by wires that fail to order.

    with hosts(3) as lan:
        head = lan.start(0, ["ray", "start", "--head", ...], log)
        lan.set_wire(1, latency_s=0.025, loss=0.01)
        lan.set_wire(1, cut=True)
        lan.kill(2)

A host is a process in namespaces of its own that only waits; killing it kills all that runs there. Its one network
device is a TUN whose packets a thread of this process carries to the host that they are addressed to, late or never.
Needs root.
"""

import contextlib
import ctypes
import fcntl
import heapq
import os
import selectors
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import IO

import psutil

_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_MTU = 9000
_ENTER = 'ip link set lo up && mkdir -p /tmp/ray && mount --bind "$0" /tmp/ray && echo ready && exec sleep infinity'


@dataclass
class Wire:
    """What a host's wire does to each packet, in both directions."""

    latency_s: float = 0.0
    loss: float = 0.0
    cut: bool = False
    carried: int = 0
    lost: int = 0


@dataclass
class Lan:
    """The hosts by number. `wires[i]` counts what the wire of host i carried and lost."""

    waiting: list["subprocess.Popen[str]"]
    pids: list[int]
    devices: list[int]
    wires: list[Wire]
    _stop: threading.Event = field(default_factory=threading.Event)

    @staticmethod
    def address(number: int) -> str:
        return f"10.77.0.{number + 1}"

    def command(self, number: int, words: list[str]) -> list[str]:
        """The command that runs `words` on a host."""
        return ["nsenter", "--target", str(self.pids[number]), "--net", "--mount", "--pid", *words]

    def start(self, number: int, words: list[str], log: IO[str], env: dict[str, str]) -> "subprocess.Popen[str]":
        return subprocess.Popen(self.command(number, words), env=env, stdout=log, stderr=log, text=True)

    def set_wire(self, number: int, latency_s: float = 0.0, loss: float = 0.0, cut: bool = False) -> None:
        """Latency is of one direction; loss a share of packets."""
        wire = self.wires[number]
        wire.latency_s, wire.loss, wire.cut = latency_s, loss, cut

    def kill(self, number: int) -> None:
        """The host is gone with all its processes."""
        self.waiting[number].kill()
        self.waiting[number].wait()

    def carry(self) -> None:
        """Takes packets from each device to that of their address, until stopped."""
        random, late, number = Random(0), [], 0
        to = {bytes(map(int, self.address(host).split("."))): host for host in range(len(self.devices))}
        with selectors.DefaultSelector() as selector:
            for host, device in enumerate(self.devices):
                selector.register(device, selectors.EVENT_READ, host)
            while not self._stop.is_set():
                wait_s = min(0.2, max(0.0, late[0][0] - time.monotonic())) if late else 0.2
                for key, _ in selector.select(wait_s):
                    for packet in _packets(key.fd):
                        target = to.get(packet[16:20])
                        if target is None:
                            continue
                        ends = (self.wires[key.data], self.wires[target])
                        if any(wire.cut or random.random() < wire.loss for wire in ends):
                            for wire in ends:
                                wire.lost += 1
                            continue
                        number += 1
                        due = time.monotonic() + sum(wire.latency_s for wire in ends)
                        heapq.heappush(late, (due, number, target, packet))
                        for wire in ends:
                            wire.carried += 1
                while late and late[0][0] <= time.monotonic():
                    _, _, target, packet = heapq.heappop(late)
                    with contextlib.suppress(OSError):  # its host was killed
                        os.write(self.devices[target], packet)


def _packets(device: int) -> Iterator[bytes]:
    """What waits on a device."""
    with contextlib.suppress(OSError):
        for _ in range(64):
            yield os.read(device, 65536)


def _device_in(pid: int) -> int:
    """A new TUN in the network namespace of a process; its descriptor works from here."""
    made: list[int] = []

    def make() -> None:  # a thread of its own, which alone moves there
        with open(f"/proc/{pid}/ns/net") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                return
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH14x", b"wire", _IFF_TUN | _IFF_NO_PI))
        made.append(descriptor)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if not made:
        raise SystemExit("no TUN device can be made here: hosts need root and /dev/net/tun")
    return made[0]


@contextlib.contextmanager
def hosts(count: int, directory: Path) -> Iterator[Lan]:
    """So many hosts, numbered from 0, for the length of the block.

    Args:
        count: of hosts.
        directory: an empty one; each host's `/tmp/ray` lies below it.
    """
    lan = Lan([], [], [], [Wire() for _ in range(count)])
    carrier = threading.Thread(target=lan.carry, daemon=True)
    try:
        for number in range(count):
            (directory / f"ray-{number}").mkdir()
            apart = ["setpriv", "--pdeathsig", "KILL"]  # also when this process ends without a word
            apart += ["unshare", "--net", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
            words = [*apart, "sh", "-c", _ENTER, str(directory / f"ray-{number}")]
            process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise SystemExit("hosts need root, unshare and mount")
            lan.waiting.append(process)
            lan.pids.append(psutil.Process(process.pid).children()[0].pid)
            lan.devices.append(_device_in(lan.pids[number]))
            up = f"ip address add {lan.address(number)}/24 dev wire && ip link set wire mtu {_MTU} up"
            subprocess.run(lan.command(number, ["sh", "-c", up]), check=True)
        carrier.start()
        yield lan
    finally:
        lan._stop.set()
        if carrier.is_alive():
            carrier.join()
        for process in lan.waiting:
            process.kill()
            process.wait()
        for device in lan.devices:
            os.close(device)
