# SPDX-License-Identifier: Apache-2.0
"""What does the Spectra suite reach on SlimPajama, subset by subset weighed?

The sizes of spectra.py on the seven subsets of SlimPajama-627B, each a dataset
of its own, drawn in the shares of the paper's 300B-token sample (arXiv
2407.12327, 3.1): another mixture is a list of weights, and no new data.

  machine   to prepare: any with 4 TB; hosts share the work (--host, --hosts).
            To train: as spectra.py. The mini: 2 CPU cores
  expected  as spectra.py: TriLM 99M 3.30, FloatLM 99M 2.99 nats a token at
            300B; the mini 4.165 after 480 steps (a check of the path, no more)
  command   python experiments/slimpajama.py split SLIMPAJAMA text
            for s in commoncrawl c4 github book arxiv wikipedia stackexchange
            do
              tritera prepare text/train/$s data/slimpajama/$s --holdout 0 \
                --tokenizer gpt-neox-20b/tokenizer.json
            done
            tritera prepare text/validation data/slimpajama/held_out \
              --holdout 0.5 --tokenizer gpt-neox-20b/tokenizer.json
            tritera train experiments/slimpajama.py:trilm_99m --mesh.fsdp -1

            python experiments/slimpajama.py mini
            tritera train experiments/slimpajama.py:mini

SLIMPAJAMA is the folder of the 627B's .jsonl.zst files, whose every line says
which subset it is of; the held-out loss is that of half of its own validation
files. The paper drew 300B tokens once and read them in order; here windows of
all 627B are drawn, none twice. The mini has the same seven names and shares,
made of the sources of packages that are installed with this one. It differs
from spectra.py in the data alone.
"""

import argparse
import dataclasses
import importlib.util
import io
import json
from pathlib import Path
import shutil

from tritera_jax import experiment_file
from tritera_jax.data import prepare
from tritera_jax.experiment import Experiment

# Name in a line's meta.redpajama_set_name, billions of tokens of the paper's
# 300, and what the mini takes instead.
SUBSETS = {
  'commoncrawl': ('RedPajamaCommonCrawl', 156, 'jax'),
  'c4': ('RedPajamaC4', 80, 'scipy'),
  'github': ('RedPajamaGithub', 16, 'numpy'),
  'book': ('RedPajamaBook', 13, 'flax'),
  'arxiv': ('RedPajamaArXiv', 13, 'optax'),
  'wikipedia': ('RedPajamaWikipedia', 12, 'orbax'),
  'stackexchange': ('RedPajamaStackExchange', 10, 'pydantic'),
}
FOLDER = 'data/slimpajama'
MINI_FOLDER = 'data/slimpajama_mini'
MINI_BYTES = 20_000  # for each billion tokens of the paper's


def on_mixture(base: Experiment, folder: str, name: str) -> Experiment:
  """The experiment on the seven datasets of a folder, by the paper's shares."""
  return dataclasses.replace(
    base,
    data=dataclasses.replace(
      base.data,
      path=f'{folder}/held_out',
      mixture=tuple(
        (f'{folder}/{subset}', float(billions))
        for subset, (_, billions, _) in SUBSETS.items()
      ),
      max_epochs=1.0 if folder == FOLDER else 0.0,
    ),
    run=dataclasses.replace(base.run, folder=f'runs/slimpajama/{name}'),
  )


def sweep() -> dict[str, Experiment]:
  here = Path(__file__)
  suite = experiment_file.load_sweep(str(here.with_name('spectra.py')))
  ablation = here.with_name('schedule_ablation.py')
  mini = experiment_file.load(f'{ablation}:mini_both_0')
  return {
    name: on_mixture(base, FOLDER, name)
    for name, base in suite.items()
    if not name.startswith('mini')
  } | {'mini': on_mixture(mini, MINI_FOLDER, 'mini')}


def split(source: Path, out: Path):
  """SlimPajama's files, each as one file for every subset.

  What is written already is left alone, so that a killed call goes on.

  Raises:
    ValueError: a line is of no known subset.
  """
  import zstandard

  subset_of = {name: subset for subset, (name, _, _) in SUBSETS.items()}
  files = sorted(source.rglob('*.jsonl.zst'))
  if not files:
    raise ValueError(f'{source} holds no .jsonl.zst files')
  for file in files:
    part, *names = file.relative_to(source).parts  # train, chunk1, ...
    stem = '-'.join(names)
    done = out / 'done' / part / stem
    if done.exists():
      continue
    writers: dict[str, io.TextIOWrapper] = {}
    with zstandard.open(file, 'rt', encoding='utf-8') as lines:
      for number, line in enumerate(lines, 1):
        found = json.loads(line)['meta']['redpajama_set_name']
        if found not in subset_of:
          raise ValueError(
            f'{file}, line {number}: {found!r} is none of {sorted(subset_of)}'
          )
        subset = subset_of[found]
        if subset not in writers:
          to = out / part / subset / stem
          to.parent.mkdir(parents=True, exist_ok=True)
          writers[subset] = zstandard.open(to, 'wt', encoding='utf-8')
        writers[subset].write(line)
    for writer in writers.values():
      writer.close()
    done.parent.mkdir(parents=True, exist_ok=True)
    done.touch()


def packages(out: Path):
  """The mini's text: files of each subset's package, up to its share.

  Every tenth file is held out; all subsets' lie together, as SlimPajama's
  validation files do.
  """
  shutil.rmtree(out, ignore_errors=True)
  for subset, (_, billions, package) in SUBSETS.items():
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    root = Path(next(iter(spec.submodule_search_locations)))
    left = MINI_BYTES * billions
    for number, file in enumerate(sorted(root.rglob('*.py'))):
      size = file.stat().st_size
      if not size or size > left:
        continue
      left -= size
      part = 'validation' if number % 10 == 9 else 'train'
      name = '-'.join(file.relative_to(root).parts)
      to = out / part / subset / name
      to.parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(file, to)


def prepare_mini(folder: Path, vocab_size: int):
  """The eight datasets; their tokenizer is trained on the seven together."""
  text = folder / 'text'
  packages(text)
  whole = folder / 'tokenizer'
  prepare.prepare(
    str(text / 'train'), str(whole), vocab_size=vocab_size, holdout=0.0
  )
  tokenizer = f'{whole}/tokenizer.json'
  for subset in SUBSETS:
    print(
      prepare.prepare(
        str(text / 'train' / subset),
        str(folder / subset),
        tokenizer=tokenizer,
        holdout=0.0,
      )
    )
  print(
    prepare.prepare(
      str(text / 'validation'),
      str(folder / 'held_out'),
      tokenizer=tokenizer,
      holdout=0.5,
    )
  )


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  verbs = parser.add_subparsers(dest='verb', required=True)
  splitting = verbs.add_parser('split', help='SlimPajama by subset')
  splitting.add_argument('source', type=Path)
  splitting.add_argument('out', type=Path)
  verbs.add_parser('mini', help=f'{MINI_FOLDER}, of installed packages')
  options = parser.parse_args()
  if options.verb == 'split':
    split(options.source, options.out)
  else:
    prepare_mini(Path(MINI_FOLDER), sweep()['mini'].model.vocab_size)


if __name__ == '__main__':
  main()
