"""Devices that a layout can be planned for, by name; torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_vlrl.config.names import unknown_name
from megatron_vlrl.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """memory: GiB that a process finds on it. machine: devices of one machine, joined by its fast links."""

    memory: float
    machine: int


# A device of `trn1` is a NeuronCore; `trn1.32xlarge` is a machine of 32.
DEVICES = {
    "a100-40g": Device(memory=39.4, machine=8),
    "a100-80g": Device(memory=79.2, machine=8),
    "h100-80g": Device(memory=79.2, machine=8),
    "h200-141g": Device(memory=139.8, machine=8),
    "trn1.2xlarge": Device(memory=16.0, machine=2),
    "trn1.32xlarge": Device(memory=16.0, machine=32),
}


def parse_devices(text: str) -> tuple[int, Device]:
    """`8xh100-80g` or `trn1.32xlarge` -> (number of devices, device). With trn1 the number before it counts machines.

    None means one. Raises ConfigError, with the nearest name, where the kind is unknown.
    """
    parts = re.fullmatch(r"(?:(\d+)x)?(.+)", text)
    if not parts or (parts[1] and int(parts[1]) == 0):
        raise ConfigError(f"--devices: {text!r} is not COUNTxKIND such as 8xh100-80g; kinds: {', '.join(DEVICES)}")
    count, kind = int(parts[1] or 1), parts[2]
    if kind not in DEVICES:
        raise unknown_name(kind, DEVICES, "--devices")
    device = DEVICES[kind]
    return count * (device.machine if kind.startswith("trn1") else 1), device
