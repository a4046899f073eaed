# SPDX-License-Identifier: Apache-2.0
"""`tritera <verb>`: parses, calls the library, prints. No logic lives here.

The library is imported verb by verb, so that --help is quick.
"""

import difflib
import sys

from tritera_jax.cli import interchange, models, studies, training

VERBS = {
  'prepare': (training.prepare, 'text to a tokenizer and token shards'),
  'train': (training.train, 'train an experiment; again: resume it'),
  'sweep': (training.sweep, 'train and score all experiments of a file'),
  'eval': (models.evaluate, 'loss on held-out or any text, scores in tasks'),
  'pack': (models.pack, 'ternary weights to 2 or 1.6 bits'),
  'quantize': (models.quantize, "a FloatLM's weights to 8..2 bits"),
  'import': (interchange.import_run, 'a Hugging Face checkpoint to a run'),
  'export': (interchange.export, 'a run to Hugging Face or GGUF'),
  'verify': (interchange.verify, 'that two artefacts hold the same trits'),
  'generate': (models.generate, 'continue a prompt'),
  'goodput': (training.goodput, 'where the time of a run went'),
  'dynamics': (studies.dynamics, 'how a loss slowed, how tokens interfere'),
  'scaling': (studies.scaling, 'laws of finished runs, and what to train next'),
  'show': (studies.show, "an experiment's size and cost, without running it"),
  'plan': (studies.plan, 'time, memory and layout of a run elsewhere'),
  'bench': (training.bench, 'time training steps beside their float twin'),
  'doctor': (models.doctor, 'check the kernels on this machine'),
}


def main(argv: list[str] | None = None) -> int:
  """Runs one verb; the exit code: 0 done, 1 refused, 2 misused."""
  verb, *args = (sys.argv[1:] if argv is None else argv) or ['--help']
  if verb in ('-h', '--help'):
    print(_usage())
    return 0
  if verb not in VERBS:
    near = difflib.get_close_matches(verb, VERBS, n=1)
    hint = f'; did you mean {near[0]}?' if near else ''
    print(f'tritera: no verb {verb!r}{hint}\n\n{_usage()}', file=sys.stderr)
    return 2
  try:
    VERBS[verb][0](args)
  except (ValueError, OSError, FloatingPointError) as error:
    print(f'tritera {verb}: {error}', file=sys.stderr)
    return 1
  return 0


def _usage() -> str:
  width = max(map(len, VERBS))
  lines = [f'  {name:<{width}}  {about}' for name, (_, about) in VERBS.items()]
  return '\n'.join(
    ['usage: tritera VERB ...', '', *lines, '', 'VERB --help tells more']
  )
