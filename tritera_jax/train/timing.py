# SPDX-License-Identifier: Apache-2.0
"""Times training steps on this machine's devices, on random tokens."""

import contextlib
import time

import jax
from jax.sharding import Mesh
import numpy as np
import optax

from tritera_jax.experiment import Experiment
from tritera_jax.parallel import rules
from tritera_jax.train import optimizer, step


class Stepper:
  """One experiment's training, a few steps a call.

  What a step reads is on the devices before the clock starts, and while it
  runs nothing may come from the host unasked.

  Attributes:
    compiled: the step.
    compile_seconds: that compiling it took.
  """

  def __init__(self, experiment: Experiment, mesh: Mesh):
    data = experiment.data
    tokens_BT1 = np.random.default_rng(0).integers(
      0,
      experiment.model.vocab_size,
      (data.batch_size, data.sequence_length + 1),
      dtype=np.int32,
    )
    self.experiment, self.mesh, self.n = experiment, mesh, 0
    self._whole = rules.shardings(mesh, ())
    update = step.jitted(experiment, mesh)
    with jax.set_mesh(mesh):
      self.tokens_BT1 = jax.device_put(tokens_BT1, step.batch_sharding(mesh))
      self.state = step.jitted_init(experiment, mesh)()
      started = time.perf_counter()
      self.compiled = update.lower(
        self.state, self.tokens_BT1, self._number(0)
      ).compile()
      self.compile_seconds = time.perf_counter() - started
    self._optimize = None

  def seconds(self, steps: int) -> float:
    """Of a step, the mean of so many.

    Raises:
      FloatingPointError: loss or gradient was not finite, so that nothing was
        updated.
    """
    numbers = [self._number(self.n + i) for i in range(steps)]
    measured = {}
    with self._undisturbed():
      started = time.perf_counter()
      for n in numbers:
        self.state, measured = self.compiled(self.state, self.tokens_BT1, n)
      jax.block_until_ready((self.state, measured))
      seconds = time.perf_counter() - started
    self.n += steps
    if not measured['updated']:
      raise FloatingPointError(
        f'loss is {float(measured["loss"])} after {self.n} steps on random '
        'tokens; lower the learning rate'
      )
    return seconds / steps

  def _number(self, n: int) -> jax.Array:
    return jax.device_put(np.int32(n), self._whole)

  def optimizer_seconds(self) -> float:
    """Of clipping, moments and parameters alone, gradients being there."""
    state = self.state
    if self._optimize is None:
      config, run = self.experiment.optimizer, self.experiment.run
      update = optimizer.make(config, run.steps)
      placed = step.shardings(self.experiment, self.mesh)

      def optimize(grads, opt_state, params):
        updates, opt_state = update.update(grads, opt_state, params)
        return opt_state, optax.apply_updates(params, updates)

      self._optimize = jax.jit(
        optimize, out_shardings=(placed.opt_state, placed.params)
      )
      self._optimize(state.params, state.opt_state, state.params)
    with self._undisturbed():
      started = time.perf_counter()
      # Any gradients take as long: the parameters are some.
      done = self._optimize(state.params, state.opt_state, state.params)
      jax.block_until_ready(done)
      return time.perf_counter() - started

  def memory(self) -> dict[str, int]:
    """Bytes of a device, as the compiler says: arguments and temporaries."""
    found = self.compiled.memory_analysis()
    assert found is not None  # every backend of ours knows
    return {
      'arguments': found.argument_size_in_bytes,
      'temporaries': found.temp_size_in_bytes,
    }

  @contextlib.contextmanager
  def _undisturbed(self):
    with jax.set_mesh(self.mesh), jax.transfer_guard('disallow'):
      yield


def peak_bytes() -> int | None:
  """Most that the first device has held in this process, if it counts it."""
  stats = jax.local_devices()[0].memory_stats()
  return stats.get('peak_bytes_in_use') if stats else None
