"""Energy by the hardware's own counters: RAPL for processors, NVML for GPUs. What cannot be read is not guessed.

Both count everything that runs on the device, so a figure is only the model's where nothing else runs.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Zone:
    """One processor package in the kernel's powercap tree. Its counter is in microjoules and starts again at 0 after
    `range_uj`."""

    path: Path
    range_uj: int

    def read_uj(self) -> int:
        return int((self.path / "energy_uj").read_text())


def find_zones(root: Path = POWERCAP) -> tuple[list[Zone], str]:
    """The packages whose counters this process may read, or none and why.

    Packages are the zones `intel-rapl:N` (AMD's have the same name) called `package-…`; those below them are parts of
    the same energy, and `psys` is the whole platform.
    """
    zones = []
    try:
        for path in sorted(root.glob("intel-rapl:*")):
            if path.name.count(":") == 1 and (path / "name").read_text().startswith("package"):
                zone = Zone(path, int((path / "max_energy_range_uj").read_text()))
                zone.read_uj()
                zones.append(zone)
    except PermissionError:
        return [], f"{root}: energy_uj is not readable for this user"
    except (OSError, ValueError) as error:
        return [], f"{root}: {error}"
    return zones, "" if zones else f"no processor counters in {root}"


class EnergyMeter:
    """Joules used between two looks at the counters of the device that computes.

    Args:
        on_gpu: look at the GPU instead of the processor.
        root: of the powercap tree.
    """

    def __init__(self, on_gpu: bool, root: Path = POWERCAP) -> None:
        self._zones: list[Zone] = []
        self._gpu: Any = None
        self.absent = ""
        """Why there is nothing to read; empty if there is."""
        if on_gpu:
            self._gpu, self.absent = _gpu_counter()
        else:
            self._zones, self.absent = find_zones(root)
        self.source = "" if self.absent else "NVML" if on_gpu else "RAPL"

    def read_j(self) -> list[float]:
        """The counters, in joules; empty if there are none."""
        if self._gpu is not None:
            return [self._gpu() / 1e3]
        return [zone.read_uj() / 1e6 for zone in self._zones]

    def used_j(self, before: list[float], after: list[float]) -> float:
        """The difference of two readings, less than one turn of a counter apart."""
        turns = [zone.range_uj / 1e6 for zone in self._zones] or [0.0] * len(before)
        steps = zip(before, after, turns, strict=True)
        return sum(end - start if end >= start else end - start + turn for start, end, turn in steps)


def _gpu_counter() -> tuple[Any, str]:
    """A function that reads the millijoules which this process's first GPU has used, or why there is none."""
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}".encode())
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except ImportError:
        return None, "the package nvidia-ml-py is not installed"
    except Exception as error:  # NVML has a class for each of its reasons
        with contextlib.suppress(Exception):
            pynvml.nvmlShutdown()
        return None, f"NVML: {error}"
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle), ""
