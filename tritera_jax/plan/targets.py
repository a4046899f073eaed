# SPDX-License-Identifier: Apache-2.0
"""Machines that a run can be planned for, by their makers' data sheets."""

import dataclasses
import difflib
import math
import re

from tritera_jax.train import throughput


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device and the networks that it hangs on; rates in bytes a second.

  Attributes:
    kind: how JAX's `device_kind` begins.
    peak: FLOP/s of dense matmuls in the compute dtype.
    memory: bytes on the device.
    bandwidth: of that memory.
    fast: that a device sends, and receives at once, inside its domain: ICI of
      a TPU slice, NVLink of a node.
    slow: the same beyond it: a device's share of its host's network.
    domain: most devices that the fast network joins.
    topology: what libtpu calls it; '' has no compiler here.
    axes: of its torus.
    source: of these figures.
  """

  kind: str
  peak: float
  memory: float
  bandwidth: float
  fast: float
  slow: float
  domain: int
  topology: str = ''
  axes: int = 0
  source: str = ''


@dataclasses.dataclass(frozen=True)
class Target:
  """So many devices of a kind."""

  name: str
  chip: Chip
  devices: int

  @property
  def domain(self) -> int:
    """Devices that the fast network joins here."""
    return math.gcd(self.devices, self.chip.domain)


def _chip(kind: str, *rates, **more) -> Chip:
  peak = throughput.data_sheet_tflops(kind)
  assert peak is not None, kind
  return Chip(kind, 1e12 * peak, *rates, **more)


_CLOUD = 'docs.cloud.google.com/tpu/docs, '
# Interconnects are printed as both directions of all links together; here is
# one. v4's and v5p's share of the data centre's network is not printed: v5e's
# is, for a pod (6.4 Tbit/s), and stands for it.
CHIPS = {
  'v4': _chip('TPU v4', 32e9, 1.2e12, 2.7e11, 3.1e9, 4096, topology='v4',
              axes=3, source=_CLOUD + 'v4; network as v5e'),
  'v5e': _chip('TPU v5 lite', 16e9, 0.819e12, 2.0e11, 3.1e9, 256,
               topology='v5e', axes=2, source=_CLOUD + 'v5e'),
  'v5p': _chip('TPU v5', 95e9, 2.765e12, 6.0e11, 3.1e9, 8960, topology='v5p',
               axes=3, source=_CLOUD + 'v5p; network as v5e'),
  'v6e': _chip('TPU v6 lite', 32e9, 1.638e12, 4.0e11, 3.1e9, 256,
               topology='v6e', axes=2, source=_CLOUD + 'v6e; network as v5e'),
  # DGX: 8 GPUs on NVLink, and a network port for each.
  'a100': _chip('NVIDIA A100', 80e9, 2.039e12, 3.0e11, 2.5e10, 8,
                source='NVIDIA A100 80GB SXM, DGX A100 (200 Gbit/s a GPU)'),
  'h100': _chip('NVIDIA H100', 80e9, 3.35e12, 4.5e11, 5.0e10, 8,
                source='NVIDIA H100 SXM, DGX H100 (400 Gbit/s a GPU)'),
  'h200': _chip('NVIDIA H200', 141e9, 4.8e12, 4.5e11, 5.0e10, 8,
                source='NVIDIA H200 SXM, DGX H200 (400 Gbit/s a GPU)'),
  'b200': _chip('NVIDIA B200', 180e9, 8.0e12, 9.0e11, 5.0e10, 8,
                source='NVIDIA DGX B200 (400 Gbit/s a GPU)'),
}  # fmt: skip


def parse(name: str) -> Target:
  """The target of 'v5e-256': a chip, and how many of them.

  Chips are counted; Google's own names of v4 and v5p count cores, two a chip.

  Raises:
    ValueError: no such chip, or no number.
  """
  known = ', '.join(f'{chip}-N' for chip in CHIPS)
  match = re.fullmatch(r'(\w+)-(\d+)', name)
  if match is None or int(match[2]) < 1:
    raise ValueError(
      f'--target {name} is not CHIP-N, such as v5e-256 or h100-1024; known: '
      f'{known}, and `here`, which is this machine'
    )
  if match[1] not in CHIPS:
    near = difflib.get_close_matches(match[1], CHIPS, n=1)
    hint = f'; did you mean {near[0]}-{match[2]}?' if near else ''
    raise ValueError(
      f'--target {name}: no chip {match[1]!r}{hint} Known: {known}, and '
      '`here`, which is this machine'
    )
  return Target(name, CHIPS[match[1]], int(match[2]))


def topology_name(target: Target) -> str | None:
  """What libtpu calls one slice of so many chips; None if it has no name.

  The axes of a slice are powers of two as near to each other as they can be.
  """
  chip, n = target.chip, target.devices
  if not chip.topology or n > chip.domain or n < 4 or n & (n - 1):
    return None
  bits = n.bit_length() - 1
  each, odd = divmod(bits, chip.axes)
  sizes = [1 << (each + (i >= chip.axes - odd)) for i in range(chip.axes)]
  if n == 4 and chip.axes == 3:
    sizes = [2, 2, 1]  # a host is 2 x 2
  return f'{chip.topology}:{"x".join(map(str, sizes))}'
