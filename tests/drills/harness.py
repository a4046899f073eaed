# SPDX-License-Identifier: Apache-2.0
"""Runs lm-eval on a run, on its packed form and on its export, and compares.

  tritera export RUN --to hf --out FOLDER
  python tests/drills/harness.py RUN --hf FOLDER --hf-python PYTHON

A run and its packed form are scored by `tritera_jax.eval.adapter`, the export
by lm-eval's own `hf` model under torch, in a Python of its own: PYTHON has
`lm_eval[hf]`, and this one lm_eval. The tasks are those of tests/eval/tasks, or
of --include; answers to single items are compared, not their means.

Torch is what decides: a packed model rounds keys and values to bfloat16 unless
told otherwise, and is compared with a tolerance of its own.
"""

import argparse
import json
from pathlib import Path
import subprocess
import sys

ROOT = Path(__file__).parents[2]
TASKS = ('tritera_next_line', 'tritera_pages', 'tritera_rest_of_line')
# Relative, of log-likelihoods.
SAME, ROUNDED = 1e-5, 2e-3


def parse():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('path', help='run folder')
  parser.add_argument('--hf', help='what `tritera export --to hf` made of it')
  parser.add_argument('--hf-python', help='that has torch and lm_eval')
  parser.add_argument('--include', default=str(ROOT / 'tests/eval/tasks'))
  parser.add_argument('--tasks', default=','.join(TASKS))
  parser.add_argument('--limit', type=int)
  parser.add_argument('--answers-of-hf', help=argparse.SUPPRESS)
  return parser.parse_args()


def answers(results: dict) -> dict[str, list]:
  """Of every item of every task: what each of its requests gave."""
  return {
    task: [answer for item in items for [answer] in item['resps']]
    for task, items in results['samples'].items()
  }


def hf(options) -> dict:
  """In the other Python: nothing of this project is imported."""
  from lm_eval import simple_evaluate
  from lm_eval.tasks import TaskManager

  results = simple_evaluate(
    'hf',
    model_args={'pretrained': options.path, 'dtype': 'float32'},
    tasks=options.tasks.split(','),
    task_manager=TaskManager(
      include_path=options.include, include_defaults=False
    ),
    limit=options.limit,
    device='cpu',
    batch_size=4,
  )
  assert results is not None
  return {'answers': answers(results), 'scores': results['results']}


def ours(options, path: Path, **more) -> dict:
  from tritera_jax.eval import harness

  found = harness.evaluate(
    path,
    options.tasks.split(','),
    include=options.include,
    limit=options.limit,
    samples=True,
    **more,
  )['lm_eval']
  return {'answers': answers(found), 'scores': found['results']}


def compare(name: str, want: dict, got: dict, tolerance: float) -> bool:
  """Prints how far answers lie apart; whether they are within tolerance."""
  good = True
  for task, items in want['answers'].items():
    others = got['answers'][task]
    assert len(items) == len(others) > 0, task
    if isinstance(items[0], str):
      alike = sum(a == b for a, b in zip(items, others, strict=True))
      good &= alike == len(items)
      words = f'{alike} of {len(items)} texts alike'
    else:
      pairs = [
        (a, b) if isinstance(a, list | tuple) else ([a, True], [b, True])
        for a, b in zip(items, others, strict=True)
      ]
      nats = max(abs(a[0] - b[0]) for a, b in pairs)
      relative = max(abs(a[0] - b[0]) / abs(a[0]) for a, b in pairs)
      alike = sum(a[1] == b[1] for a, b in pairs)
      good &= relative <= tolerance and alike == len(pairs)
      words = (
        f'{len(pairs)} log-likelihoods, most apart {nats:.1e} nats, '
        f'{relative:.1e} relative; is_greedy alike in {alike}'
      )
    print(f'{name}: {task}: {words}', flush=True)
  for task, scores in want['scores'].items():
    for metric, value in scores.items():
      other = got['scores'][task].get(metric)
      if isinstance(value, float) and value != other:
        print(f'{name}: {task}: {metric} {value:.6f}, {other:.6f}')
  print(f'{name}: {"within" if good else "NOT WITHIN"} {tolerance:g}')
  return good


def main() -> int:
  options = parse()
  if options.answers_of_hf:
    Path(options.answers_of_hf).write_text(json.dumps(hf(options)))
    return 0
  run = Path(options.path)
  latent = ours(options, run)
  good = True
  for packed in sorted((run / 'packed').glob('*/model.safetensors')):
    name = f'packed {packed.parent.name}'
    folder = packed.parent
    exact = ours(options, folder, activations='float', cache='float32')
    good &= compare(f'{name}, float32 cache', latent, exact, SAME)
    rounded = ours(options, folder, activations='float')
    good &= compare(f'{name}, bfloat16 cache', latent, rounded, ROUNDED)
  if options.hf:
    file = Path(options.hf).absolute().parent / 'answers_of_hf.json'
    more = ['--limit', str(options.limit)] if options.limit else []
    subprocess.run(
      [
        options.hf_python, __file__, options.hf, '--include', options.include,
        '--tasks', options.tasks, '--answers-of-hf', str(file), *more,
      ],
      check=True,
    )  # fmt: skip
    good &= compare('hf', json.loads(file.read_text()), latent, SAME)
  return 0 if good else 1


if __name__ == '__main__':
  sys.exit(main())
