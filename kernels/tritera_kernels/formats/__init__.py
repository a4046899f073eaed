# SPDX-License-Identifier: Apache-2.0
"""The packed formats by name.

A format is a module with NAME, LAYOUT_VERSION, CODES_PER_BYTE, `pack_planes`
(digits code + 1 to bytes), `decode_tile` (bytes to the codes of each plane,
usable inside a Pallas kernel) and `is_valid` (which bytes can occur).
"""

import types

from tritera_kernels.formats import base_three, two_bit

FORMATS = {module.NAME: module for module in (two_bit, base_three)}


def get(name: str) -> types.ModuleType:
  """The format's module.

  Raises:
    ValueError: no such format; the known ones are named.
  """
  if name not in FORMATS:
    raise ValueError(f'format={name!r} is unknown; known: {sorted(FORMATS)}')
  return FORMATS[name]
