# SPDX-License-Identifier: Apache-2.0
import dataclasses
import importlib.util
from pathlib import Path
import re

import pytest

from tests import tiny
from tritera_jax import cli
from tritera_jax.parallel import collectives
from tritera_jax.parallel.mesh import MeshConfig
from tritera_jax.plan import aot, here, plan, targets
from tritera_jax.plan.reliability import Assumptions

QUICKSTART = 'experiments/quickstart.py'


@pytest.fixture
def experiment():
  found = tiny.experiment(Path('data'), Path('run'), 10)
  return dataclasses.replace(found, mesh=MeshConfig())


def make(experiment, target='h100-2', compare=True, compiles=1):
  return plan.make(
    experiment,
    targets.parse(target),
    assumed=Assumptions(),
    compare=compare,
    compiles=compiles,
    say=lambda text: None,
  )


def test_a_plan_says_what_is_exact_and_what_an_estimate(capsys):
  code = cli.main(['plan', QUICKSTART, '--target', 'h100-2', '--tokens', '1e9'])
  out = capsys.readouterr().out
  assert code == 0
  how = {}
  for line in out.split('\n\n')[0].splitlines():
    name, mark = re.split('  +', line)[:2]
    how[name] = mark
  assert how['tokens'] == how['checkpoint'] == 'exact'
  assert how['machine'] == 'data sheet'
  for name in ('memory', 'collectives', 'step', 'speed', 'goodput', 'run'):
    assert how[name] == 'estimate'
  assert f'999,999,488 = {10**9 // 1024:,} steps x 8 x 128' in out
  # Latents and two moments of 3,802,368 parameters, and four counters.
  assert '0.04563 GB before compression' in out
  assert 'not compiled: XLA compiles for NVIDIA H100 only where' in out
  assert '--mesh.data 1 --mesh.fsdp 1' in out and 'device-hours' in out


def test_days_are_steps_over_goodput(experiment):
  made = make(experiment)
  seconds = made.best.costs.seconds * 10 / made.saving.goodput
  assert made.days * 86_400 == pytest.approx(seconds)
  assert made.best.costs.fits and made.others


def test_an_experiment_that_cannot_run_there_is_told_why(experiment):
  own = dataclasses.replace(experiment, mesh=MeshConfig(fsdp=16))
  made = make(own, 'h100-16')
  assert isinstance(made.own, str) and 'data.batch_size=8' in made.own
  assert f'it cannot run: {made.own}' in plan.words(made)
  with pytest.raises(ValueError, match='data.batch_size=8 must be a multiple'):
    make(own, 'h100-16', compare=False)
  with pytest.raises(ValueError, match='takes 16 devices, but there are 8'):
    make(own, 'h100-8')


def test_what_fits_nowhere_is_refused(experiment, monkeypatch):
  small = dataclasses.replace(targets.CHIPS['h100'], memory=1e5)
  monkeypatch.setitem(targets.CHIPS, 'h100', small)
  with pytest.raises(ValueError, match='needs .* the least of all.*; take'):
    make(experiment)


def test_the_compiler_corrects_the_network_and_what_it_refuses_is_told(
  experiment, monkeypatch
):
  """With another machine's program in place of a TPU's."""
  monkeypatch.setattr(aot, 'why_not', lambda target: None)
  asked = []

  def compile(laid_out, target):
    asked.append(laid_out)
    if len(asked) == 1:
      raise aot.Refused('no room')
    sent = collectives.bytes_per_device(collectives.of(HLO))
    return aot.Compiled(1000, 2000, sent, 0.1)

  monkeypatch.setattr(aot, 'compile', compile)
  made = make(experiment)
  assert asked[1] == made.best.experiment
  fast = targets.CHIPS['h100'].fast
  # An all-gather among eight: seven eighths of 32,768 float32.
  assert made.compiled is not None
  assert made.compiled.sent == {'all-gather': 4 * 32_768 * 7 // 8}
  assert made.best.costs.network == pytest.approx(
    4 * 32_768 * 7 / 8 / fast / 0.7
  )
  words = plan.words(made)
  assert 'the compiler refused --mesh' in words and 'no room' in words
  assert 'arguments 1e-06, temporaries 2e-06' in words


HLO = """HloModule m, num_partitions=8

ENTRY %main (x: f32[4096]) -> f32[32768] {
  %x = f32[4096]{0} parameter(0)
  ROOT %g = f32[32768]{0} all-gather(%x), replica_groups=[1,8]<=[8], \
dimensions={0}
}
"""


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    (('--target', 'h10-8'), 'did you mean h100-8'),
    (('--target', 'h100-8', '--tokens', '5'), 'less than one step of 1,024'),
    (('--target', 'h100-8', '--check', '3'), 'give --target here'),
    (('--target', 'h100-8', '--mesh.fsdp', '3'), 'there are 8'),
  ],
)
def test_what_a_user_asks_wrongly(capsys, arguments, words):
  assert cli.main(['plan', QUICKSTART, *arguments]) == 1
  assert words in capsys.readouterr().err


def test_estimates_are_put_beside_a_run(experiment, monkeypatch):
  monkeypatch.setattr(here, '_WIDTH', 64)
  monkeypatch.setattr(here, '_COPY_BYTES', 1 << 16)
  monkeypatch.setattr(here, '_SECONDS', 0.01)
  own = dataclasses.replace(experiment, mesh=MeshConfig(2, 2, 2))
  text = here.check(own, here.measured(own), 2)
  assert 'measured here, now' in text
  rows = {
    re.split('  +', line)[0]: line.split()[-3:]
    for line in text.splitlines()[5:]
  }
  estimate, measured, ratio = map(float, rows['state, MB a device'])
  assert ratio == pytest.approx(measured / estimate, abs=0.01)
  assert ratio == pytest.approx(1, abs=0.02)
  assert float(rows['step, s'][1]) > 0
  assert float(rows['collectives, MB a device'][1]) > 0


@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason='runs where libtpu is: pip install --no-deps libtpu',
)
def test_the_tpus_compiler_agrees_about_the_state(experiment):
  made = make(experiment, 'v5e-8')
  assert made.compiled is not None
  # Its tiles pad small arrays, never shrink them.
  assert made.compiled.arguments >= made.best.costs.memory['state']
  assert sum(made.compiled.sent.values()) > 0
