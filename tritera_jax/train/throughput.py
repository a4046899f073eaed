# SPDX-License-Identifier: Apache-2.0
"""Speed of training, and the share of the devices' peak that it uses.

  model FLOP/s = training_flops_per_token(T) * tokens a second
  MFU = model FLOP/s / (devices * peak FLOP/s of one)

FLOPs of the model alone: what remat computes again, and ternarising, do not
count as work done (PaLM, appendix B).
"""

import jax

from tritera_jax.experiment import Experiment
from tritera_jax.model import flops

# Dense bfloat16 peaks in TFLOP/s, from the makers' data sheets, by the start
# of JAX's device_kind; the first that fits is taken.
_PEAK_TFLOPS = {
  'NVIDIA B200': 2250.0,
  'NVIDIA H200': 989.0,
  'NVIDIA H100 PCIe': 756.0,
  'NVIDIA H100': 989.0,
  'NVIDIA A100': 312.0,
  'NVIDIA L40S': 362.0,
  'TPU v6 lite': 918.0,
  'TPU v5 lite': 197.0,
  'TPU v5': 459.0,
  'TPU v4': 275.0,
  'TPU v3': 61.5,  # a core
}


def data_sheet_tflops(kind: str) -> float | None:
  """Of a device that JAX calls `kind`, in bfloat16; None if not known."""
  for start, peak in _PEAK_TFLOPS.items():
    if kind.startswith(start):
      return peak
  return None


def peak_tflops(experiment: Experiment, kind: str) -> float | None:
  """Of one device, in the compute dtype; None if it is not known."""
  if experiment.run.peak_tflops:
    return experiment.run.peak_tflops
  if experiment.model.dtype != 'bfloat16':
    return None
  return data_sheet_tflops(kind)


def measures(experiment: Experiment, step: int, steps: int, seconds: float):
  """Metrics of the last `steps` steps, which took `seconds`, up to `step`.

  step_seconds, tokens_per_second, tflops_per_second (of the model, over all
  devices), mfu if the peak is known, and eta_seconds to the end of the run.
  """
  step_seconds = seconds / steps
  tokens_per_second = experiment.batch_tokens / step_seconds
  per_token = flops.training_flops_per_token(
    experiment.model, experiment.data.sequence_length
  )
  tflops = per_token * tokens_per_second / 1e12
  measured = {
    'step_seconds': step_seconds,
    'tokens_per_second': tokens_per_second,
    'tflops_per_second': tflops,
    'eta_seconds': (experiment.run.steps - step) * step_seconds,
  }
  peak = peak_tflops(experiment, jax.devices()[0].device_kind)
  if peak:
    measured['mfu'] = tflops / (jax.device_count() * peak)
  return measured
