# SPDX-License-Identifier: Apache-2.0
"""Does a constant rate forget less than warming up again, on new data?

A model is trained on corpus A and then on corpus B, as many tokens of each,
under the infinite schedule (arXiv 2503.02844) or under cosines:

  infinite    A, then B at the constant rate, annealed at the end of B
  annealed_a  the branch off it that is annealed at the end of A
  cosine_a    a cosine on A alone
  rewarmed    a cosine on B, warmed up again, from cosine_a's parameters
  scratch     one cosine on A and B mixed, as many steps as both: the bound

  machine   any mesh for TriLM 99M on 100B tokens of each; the mini, TriLMs of
            0.4M parameters on 0.3M of each, 2 CPU cores
  expected  the paper's claim: infinite keeps more of A than rewarmed, and is no
            worse on B
  command   python experiments/continual.py mini 0   (makes the data, trains all
            five, prints their losses on both corpora)
            tritera train experiments/continual.py:infinite --data.path A \
              --data.mixture A 1 B 0 --mesh.fsdp -1

What the mini said (seed 0, 2 threads of an AMD EPYC Zen 4, 2026-11-22), nats a
token held out of A and of B:

  infinite    4.484  2.902        rewarmed  5.397  2.747
  annealed_a  2.783  4.643        scratch   2.707  3.042
  cosine_a    2.722  4.603

The constant rate keeps more of A, as claimed; on B it is behind by 0.16, which
is not. One seed, and B is half a megabyte.

The mini's A is the standard library's code, its B the language's manual, which
Python brings along (pydoc_data): 0.5 MB, read some twice. The paper replays 5 %
of A beside B; here B comes alone, unless data.reweighted says otherwise.
`rewarmed` takes parameters alone, with a fresh optimizer (run.start_from); a
branch takes the whole checkpoint. Unlike schedule_ablation.py: two corpora.
"""

import argparse
import dataclasses
import functools
import json
from pathlib import Path
import shutil

from tritera_jax import experiment_file
from tritera_jax.data import prepare, shards
from tritera_jax.eval import perplexity
from tritera_jax.experiment import Experiment, OptimizerConfig
from tritera_jax.generate import load
from tritera_jax.ternary.schedule import CosineSchedule, InfiniteSchedule
from tritera_jax.train import loop

ARMS = ('infinite', 'annealed_a', 'cosine_a', 'rewarmed', 'scratch')
TOKENS = 100 * 10**9  # of each corpus
MINI_STEPS = 300
SEEDS = 3
CORPORA = ('data/continual/a', 'data/continual/b')


def member(
  arm: str, base: Experiment, *, steps: int, peak: float, warmup: int, name: str
) -> Experiment:
  """The base on the corpora, `steps` of each, under the arm's schedule."""
  a, b = CORPORA
  folder = lambda name: f'runs/continual/{name}'
  annealing = steps // 5
  data = dataclasses.replace(base.data, path=a)
  run = dataclasses.replace(
    base.run,
    folder=folder(name),
    steps=steps,
    evaluate_every=0,
    keep_every=steps - annealing if arm == 'infinite' else 0,
  )
  if arm in ('infinite', 'annealed_a'):
    schedule = InfiniteSchedule(
      peak,
      constant=peak / 3,
      minimum=peak / 100,
      warmup_steps=warmup,
      cooldown_steps=steps // 4,
      annealing_steps=annealing,
    )
  else:
    schedule = CosineSchedule(peak, warmup_steps=warmup)
  if arm == 'infinite':
    data = dataclasses.replace(
      data, mixture=((a, 1.0), (b, 0.0)), reweighted=((steps, (0.0, 1.0)),)
    )
  elif arm == 'scratch':
    data = dataclasses.replace(data, mixture=((a, 1.0), (b, 1.0)))
  if arm in ('infinite', 'scratch'):
    run = dataclasses.replace(run, steps=2 * steps)
  if arm == 'rewarmed':
    data = dataclasses.replace(data, path=b)
    start = folder(name.replace('rewarmed', 'cosine_a'))
    run = dataclasses.replace(run, start_from=start)
  return dataclasses.replace(
    base, data=data, optimizer=OptimizerConfig(schedule), run=run
  )


def paper(arm: str) -> Experiment:
  base = _sibling('spectra.py:trilm_99m')
  return member(
    arm, base, steps=TOKENS // base.batch_tokens, peak=2.4e-3, warmup=1000,
    name=arm,
  )  # fmt: skip


def mini(arm: str, seed: int) -> Experiment:
  base = _sibling(f'schedule_ablation.py:mini_both_{seed}')
  return member(
    arm, base, steps=MINI_STEPS, peak=base.optimizer.schedule.peak, warmup=30,
    name=f'mini_{arm}_{seed}',
  )  # fmt: skip


@functools.cache
def _sibling(name: str) -> Experiment:
  return experiment_file.load(f'{Path(__file__).parent}/{name}')


def sweep() -> dict[str, Experiment]:
  return {arm: paper(arm) for arm in ARMS} | {
    f'mini_{arm}_{seed}': mini(arm, seed)
    for seed in range(SEEDS)
    for arm in ARMS
  }


def prepare_mini(vocab_size: int):
  """The standard library's code, and the manual with the same tokenizer."""
  from pydoc_data import topics  # half a megabyte of text

  a, b = map(Path, CORPORA)
  print(prepare.prepare('stdlib', str(a), vocab_size=vocab_size))
  b.parent.mkdir(parents=True, exist_ok=True)
  corpus = b.with_suffix('.jsonl')
  corpus.write_text(
    ''.join(
      json.dumps({'text': text}) + '\n' for text in topics.topics.values()
    )
  )
  tokenizer = f'{a}/tokenizer.json'
  print(prepare.prepare(str(corpus), str(b), tokenizer=tokenizer, holdout=0.1))


def branch(trunk: Experiment, arm: Experiment):
  """Begins the arm with a copy of the trunk's checkpoint where it anneals."""
  schedule = arm.optimizer.schedule
  assert isinstance(schedule, InfiniteSchedule)
  step = f'checkpoints/{arm.run.steps - schedule.annealing_steps}'
  to = Path(arm.run.folder) / step
  if not to.parent.exists():
    shutil.copytree(Path(trunk.run.folder) / step, to)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('what', choices=['mini'])
  parser.add_argument('seed', type=int, choices=range(SEEDS))
  seed = parser.parse_args().seed
  arms = {arm: mini(arm, seed) for arm in ARMS}
  prepare_mini(arms['infinite'].model.vocab_size)
  print(f'{"nats a token on":<16}' + ''.join(f'{c:>20}' for c in CORPORA))
  for name, arm in arms.items():
    if name == 'annealed_a':
      branch(arms['infinite'], arm)
    loop.train(arm, quiet=True)
    model = load.load(arm.run.folder).model
    T = arm.data.sequence_length
    losses = [
      perplexity.head_loss(
        model,
        shards.open_split(corpus, 'validation'),
        tokens=2**16,
        sequence_length=T,
        stride=T,
      )
      for corpus in CORPORA
    ]
    print(
      f'{name:<16}' + ''.join(f'{nats:>20.4f}' for nats in losses), flush=True
    )


if __name__ == '__main__':
  main()
