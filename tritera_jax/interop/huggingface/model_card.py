# SPDX-License-Identifier: Apache-2.0
"""The README.md of an exported model: what its run's folder says, no more.

Paths stay at home: of datasets and of other runs only last names are told.
"""

from collections.abc import Sequence
import json
from pathlib import Path
from typing import Any

from tritera_jax.experiment import Experiment
from tritera_jax.model import flops
from tritera_jax.train import metrics

_FAMILIES = {
  'ternary': 'TriLM: weights of linear layers are a scale times -1, 0 or 1',
  'binary': 'BiLM: weights of linear layers are a scale times -1 or 1',
  'float': 'FloatLM',
}
UNKNOWN = 'not recorded'


def text(
  run: Path,
  experiment: Experiment,
  step: int,
  *,
  name: str,
  architecture: str,
  licence: str,
  dtype: str,
  form: str,
  fingerprint: str | None,
  written: str | None,
  notes: Sequence[str],
) -> str:
  """A card for the Hugging Face hub.

  Args:
    run: the run's folder; its metrics and records are read.
    experiment: the run's.
    step: of the checkpoint.
    name: of the model, its heading.
    architecture: class of transformers.
    licence: of the model.
    dtype: of the tensors.
    form: of the matrices, as of `architectures.config_json`.
    fingerprint: of the run's codes and scales, if it has ternary ones.
    written: of those in the exported folder.
    notes: what the reader has to know.
  """
  header = {
    'library_name': 'transformers',
    'pipeline_tag': 'text-generation',
    'license': licence,
    'tags': ['tritera', experiment.model.family],
  }
  lines = ['---', *(f'{k}: {json.dumps(v)}' for k, v in header.items()), '---']
  lines += ['', f'# {name}', '']
  lines += _table(_model_rows(experiment, architecture, dtype, form))
  lines += ['', '## Training', '']
  lines += _table(_training_rows(run, experiment, step))
  lines += ['', '## Use', '', '```python', _use(name, dtype), '```', '']
  if fingerprint:
    lines.append(
      f'Codes and scales of the run have the fingerprint\n`{fingerprint}`.'
    )
    if written != fingerprint:
      lines.append(f'Those that can be read here have\n`{written}`.')
    lines.append('')
  lines += [f'* {note}' for note in notes]
  return '\n'.join(lines).rstrip() + '\n'


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
  def cell(words: str) -> str:
    return ' '.join(words.split()).replace('|', r'\|')

  lines = ['| | |', '|---|---|']
  return lines + [f'| {key} | {cell(value)} |' for key, value in rows]


def _model_rows(experiment: Experiment, architecture: str, dtype, form):
  model = experiment.model
  blocks = model.scale_blocks
  return [
    ('type', _FAMILIES[model.family]),
    ('architecture', f'{architecture}, {form}, {dtype}'),
    (
      'shape',
      f'{model.layers} layers, width {model.d_model}, MLP {model.d_ff}, '
      f'{model.heads} heads of {model.head_dim} ({model.kv_heads} of keys and '
      f'values), context {model.context_length}',
    ),
    (
      'parameters',
      f'{flops.parameters(model):,}, of them {flops.linear_parameters(model):,}'
      ' in linear layers',
    ),
    (
      'size',
      f'{flops.size_bits(model) / 1e6:,.1f} Mbit at '
      f'{flops.PAPER_BITS[model.family]:g} bits a weight of a linear layer and '
      '16 of the rest',
    ),
    (
      'vocabulary',
      f'{model.vocab_size:,} tokens, padded to {model.padded_vocab_size:,}',
    ),
    *([('scales a matrix', str(blocks))] if model.family != 'float' else []),
    ('activations', 'int8' if model.activation_bits else 'not quantised'),
  ]


def _training_rows(run: Path, experiment: Experiment, step: int):
  records = [r for r in metrics.read(run) if r['step'] <= step]
  imported = _record(run, 'imported.json')
  if imported is not None:
    return [
      ('imported from', _last_name(imported.get('source', ''))),
      ('data, tokens, losses', f'{UNKNOWN} there or here'),
    ]
  data = experiment.data
  shares = sum(weight for _, weight in data.sources)
  rows = [
    (
      'data',
      ', '.join(
        f'{_last_name(path)} ({weight / shares:.3g} of it)'
        if len(data.sources) > 1
        else _last_name(path)
        for path, weight in data.sources
      ),
    ),
    (
      'tokens',
      f'{step * experiment.batch_tokens:,}: {step:,} steps of '
      f'{data.batch_size} x {data.sequence_length}',
    ),
    ('training loss', _loss(records, 'loss')),
    (
      'loss on held-out text, its first '
      f'{experiment.run.evaluate_tokens:,} tokens',
      _loss(records, 'held_out_loss'),
    ),
    ('schedule', str(experiment.optimizer.schedule)),
    ('seed', str(experiment.run.seed)),
  ]
  if experiment.run.start_from:
    rows.append(
      ('started from', f'{_last_name(experiment.run.start_from)}, its weights')
    )
  quantized = _record(run, 'quantized.json')
  if quantized is not None:
    how = quantized.get('quantization', {})
    rows.append(
      (
        'quantised after training',
        f'{how.get("method")}, {how.get("bits")} bits, groups of '
        f'{how.get("group")}',
      )
    )
  written = _record(run, 'experiment.json') or {}
  if written.get('commit'):
    rows.append(('code', f'tritera_jax {written["commit"]}'))
  return rows


def _loss(records: list[dict], field: str) -> str:
  found = [record for record in records if field in record]
  if not found:
    return UNKNOWN
  last = found[-1]
  return f'{last[field]:.4f} nats a token, at step {last["step"]:,}'


def _record(run: Path, name: str) -> dict[str, Any] | None:
  file = run / name
  return json.loads(file.read_text()) if file.exists() else None


def _last_name(path: str) -> str:
  return path.rstrip('/').rpartition('/')[2] or UNKNOWN


def _use(name: str, dtype: str) -> str:
  return f"""\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained('{name}')
model = AutoModelForCausalLM.from_pretrained('{name}', dtype=torch.{dtype})
inputs = tokenizer('Once', return_tensors='pt')
tokens = model.generate(**inputs, max_new_tokens=32)
print(tokenizer.decode(tokens[0]))"""
