# SPDX-License-Identifier: Apache-2.0
"""How often to save, and how much of the time is then productive.

With M seconds between failures, C seconds that a save stops training and R
seconds to be back at work after a failure:

  interval = sqrt(2 C M)                    (Young, CACM 17(9), 1974)
  lost     = C / interval + (interval / 2 + R) / M

the second being the first order of Daly (FGCS 22(3), 2006): each interval pays
for its save, each failure for half an interval and the way back.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Assumptions:
  """About a machine that nobody has measured yet.

  Attributes:
    failure_hours: hours that one device works between failures that end the
      run. Llama 3's 419 unexpected interruptions in 54 days on 16,384 GPUs
      (arXiv 2407.21783, 3.3.4) are one in 50,000.
    blocking_rate: bytes a second at which a device's state is copied to its
      host while training waits; the rest of a save is asynchronous. Assumed:
      a third of PCIe 4 x16.
    blocking_seconds: that a save costs beside the copy. Assumed.
    restart_seconds: from a failure to the next step: noticing it, starting
      processes, compiling, restoring. Assumed.
  """

  failure_hours: float = 50_000.0
  blocking_rate: float = 1e10
  blocking_seconds: float = 1.0
  restart_seconds: float = 600.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not 0 < value < math.inf:
        name = field.name.replace('_', '-')
        raise ValueError(f'--assume.{name} {value} must be > 0')


@dataclasses.dataclass(frozen=True)
class Saving:
  """What follows from the assumptions.

  Attributes:
    cost: seconds that training waits for a save.
    interval: seconds between saves.
    goodput: expected share of the time that steps take.
    failures: seconds between failures of the whole machine.
  """

  cost: float
  interval: float
  goodput: float
  failures: float


def saving(
  assumed: Assumptions, devices: int, device_bytes: float, step: float
) -> Saving:
  """When to save a state, of so many bytes a device; at least a step apart."""
  cost = assumed.blocking_seconds + device_bytes / assumed.blocking_rate
  failures = 3600 * assumed.failure_hours / devices
  interval = max(math.sqrt(2 * cost * failures), step)
  lost = cost / interval
  lost += (interval / 2 + assumed.restart_seconds) / failures
  return Saving(cost, interval, max(0.0, 1 - lost), failures)
