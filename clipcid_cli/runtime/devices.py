"""What devices can do: a table of GPUs by their makers' data sheets, and the name of some of them, such as ``8xH100``."""

from __future__ import annotations

import dataclasses
import re

from clipcid_cli.errors import UsageError

THIS = "this"
"""The name of the device at hand, which is measured."""

# Of a data sheet's figures, what kernels of the shapes of a CLIP reach: assumed.
_SHARE_OF_PRODUCTS = 0.6
_SHARE_OF_BANDWIDTH = 0.8

_GIVEN = re.compile(r"(?:(\d{1,6})x)?([A-Za-z][A-Za-z0-9]*)")


@dataclasses.dataclass(frozen=True)
class Device:
    """Rates of a device, in operations or bytes a second, and its memory."""

    name: str
    product: float  # of products in 16 bits; of a CPU in the format that it trains in
    exact: float  # of products in float32 without TF32
    bandwidth: float  # of its memory
    memory: float  # bytes
    is_measured: bool = False
    is_mixed: bool = True  # whether it trains in 16 bits
    is_gpu: bool = True

    def reached(self) -> Device:
        """Return what programs reach of a data sheet; measured rates stay as they are."""
        if self.is_measured:
            return self
        return dataclasses.replace(
            self,
            product=_SHARE_OF_PRODUCTS * self.product,
            exact=_SHARE_OF_PRODUCTS * self.exact,
            bandwidth=_SHARE_OF_BANDWIDTH * self.bandwidth,
        )


# Dense bf16, float32, bandwidth and memory of the SXM forms (L4: PCIe).
DEVICES = {
    device.name: device
    for device in (
        Device("H100", 989e12, 67e12, 3.35e12, 80e9),
        Device("H200", 989e12, 67e12, 4.8e12, 141e9),
        Device("A100", 312e12, 19.5e12, 2.04e12, 80e9),
        Device("L4", 121e12, 30.3e12, 0.3e12, 24e9),
    )
}


def parse_devices(text: str) -> tuple[int, str]:
    """Return the number and the name of ``8xH100``; a name alone is one device."""
    parts = _GIVEN.fullmatch(text)
    names = {name.lower(): name for name in (*DEVICES, THIS)}
    if parts is None or parts[2].lower() not in names or parts[1] == "0":
        raise UsageError(
            f"--gpus cannot be {text!r}.",
            f"Give a number and a name, as in 8xH100; names are {', '.join(DEVICES)}, and {THIS} for the device at hand.",
        )
    return int(parts[1] or 1), names[parts[2].lower()]


def find_device(marketed: str) -> Device | None:
    """Return the row of the table for a GPU as its driver names it, such as ``NVIDIA H100 80GB HBM3``."""
    words = re.split(r"[^A-Za-z0-9]+", marketed)
    return next((device for name, device in DEVICES.items() if name in words), None)
