# SPDX-License-Identifier: Apache-2.0
"""The runs of a sweep, one after another or as a job array, in one table.

Each run is trained and then scored by processes of their own, the second of
which leaves its row in RUN/result.json. The rows that are there are the table.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import fnmatch
from pathlib import Path
import shlex
import signal
import subprocess
import sys

from tritera_jax.checkpoint import save
from tritera_jax.data import shards
from tritera_jax.eval import perplexity
from tritera_jax.experiment import Experiment
from tritera_jax.model import flops
from tritera_jax.scaling import runs
from tritera_jax.scaling.runs import Run
from tritera_jax.train import exits, goodput

_RESULT = 'result.json'


def chosen(
  sweep: Mapping[str, Experiment], patterns: Sequence[str]
) -> dict[str, Experiment]:
  """Those whose name fits a pattern ('mini_*'); without patterns: all.

  Raises:
    ValueError: a pattern fits none.
  """
  for pattern in patterns:
    if not fnmatch.filter(sweep, pattern):
      raise ValueError(
        f'nothing fits {pattern!r}; there are {_few(list(sweep))}'
      )
  return {
    name: experiment
    for name, experiment in sweep.items()
    if not patterns or any(fnmatch.fnmatch(name, p) for p in patterns)
  }


def _few(names: Sequence[str]) -> str:
  """Names, or the first of many."""
  if len(names) <= 12:
    return ', '.join(names)
  return f'{len(names)} names: {", ".join(names[:8])}, ...'


def job_array(
  file: str, names: Sequence[str], out: Path, overrides: Sequence[str]
) -> str:
  """A script for SLURM that runs each of the names as a task of an array.

  What a task is given (devices, time, account) is to be filled in.
  """
  rest = ['--', *overrides] if overrides else []
  options = shlex.join(['--out', str(out), *rest])
  return f"""#!/bin/bash
#SBATCH --job-name={shlex.quote(out.name)}
#SBATCH --array=0-{len(names) - 1}
#SBATCH --signal=TERM@300
#SBATCH --requeue
names=({shlex.join(names)})
code=0
srun tritera sweep {shlex.quote(file)} \\
  "${{names[SLURM_ARRAY_TASK_ID]}}" {options} || code=$?
# The same command goes on after any code above 2.
if ((code > 2)); then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""


def sweep(
  file: str,
  members: Mapping[str, Experiment],
  out: Path,
  overrides: Sequence[str],
  say: Callable[[str], None],
) -> list[str]:
  """Runs what has no result yet, one after another, and writes the table.

  Args:
    file: the experiment file.
    members: of its sweep, by name, `overrides` applied.
    out: folder of the run folders, each by its name, and of runs.jsonl.
    overrides: of the command line, for `tritera train`.
    say: is told of every run.

  Returns:
    Names of runs that failed; their processes said why.

  Raises:
    ValueError: a run folder holds another experiment than its name says now.
    SystemExit: stopped by a signal, the run saved: its code. The same call
      goes on.
  """
  for name, experiment in members.items():
    if (out / name / 'experiment.json').exists():
      save.check_same(save.read_experiment(out / name), experiment, out / name)
  out.mkdir(parents=True, exist_ok=True)
  failed = []
  for number, name in enumerate(members, 1):
    run = out / name
    if not (run / _RESULT).exists():
      say(f'{number}/{len(members)} {name}')
      folder = ['--run.folder', str(run)]
      train = ['tritera_jax', 'train', f'{file}:{name}', *folder, *overrides]
      code = _finish(train) or _finish(['tritera_jax.sweep', str(run)])
      if code > 128:
        raise SystemExit(code)
      if code:
        failed.append(name)
        say(f'{name} failed with {code}')
        continue
    result = _read(run)
    say(
      f'{name}: {result.held_out_loss:.4f} nats a token after '
      f'{result.tokens:,} tokens, {result.seconds:,.0f} s'
    )
    _collect(out)
  return failed


def _finish(arguments: list[str]) -> int:
  """Runs a module until it ends, again if it may go on; its exit code."""
  for _ in range(3):
    child = subprocess.Popen([sys.executable, '-m', *arguments])
    with _passing_on(signal.SIGTERM, child):
      try:
        code = child.wait()
      except KeyboardInterrupt:  # the terminal has told the child as well
        code = child.wait()
    if code != exits.EXIT_AGAIN:
      break
  # Of a child that a signal killed, what a shell would say.
  return 128 - code if code < 0 else code


@contextlib.contextmanager
def _passing_on(number: int, child: subprocess.Popen):
  before = signal.signal(number, lambda *_: child.send_signal(number))
  try:
    yield
  finally:
    signal.signal(number, before)


def _read(run: Path) -> Run:
  return runs.parse((run / _RESULT).read_text(), str(run / _RESULT))


def _collect(out: Path):
  """All results below `out`, those of other calls too.

  Again where another call had one meanwhile: whoever writes last has them all.
  """
  found: list[Path] = []
  while (now := sorted(out.glob(f'*/{_RESULT}'))) != found:
    found = now
    runs.write(out, [_read(file.parent) for file in found])


def result(run: Path) -> Run:
  """The row of a finished run, scored on all of its held-out text."""
  experiment = save.read_experiment(run)
  model = experiment.model
  loss = perplexity.evaluate(run)
  embeddings = flops.embedding_parameters(model, padded=False)
  parameters = flops.parameters(model, padded=False)
  per_token = flops.training_flops_per_token(
    model, experiment.data.sequence_length
  )
  return Run(
    name=run.name,
    family=model.family,
    parameters=parameters,
    parameters_without_embeddings=parameters - embeddings,
    bits=flops.size_bits(model),
    tokens=experiment.tokens,
    flops=float(per_token * experiment.tokens),
    held_out_loss=loss.nats_per_token,
    bits_per_byte=loss.bits_per_byte,
    seed=experiment.run.seed,
    seconds=goodput.measured(run).seconds[goodput.TRAINING],
    held_out=_fingerprint(experiment),
  )


def _fingerprint(experiment: Experiment) -> str:
  source = shards.open_split(experiment.data.path, 'validation')
  return f'{source.manifest.tokenizer[:16]}-{source.fingerprint[:16]}'


def _score(run: Path):
  partial = run / 'result.partial'
  partial.write_text(f'{runs.line(result(run))}\n')
  partial.rename(run / _RESULT)


if __name__ == '__main__':
  _score(Path(sys.argv[1]))
