# SPDX-License-Identifier: Apache-2.0
"""Verbs that take a run or a packed model."""

import functools
from pathlib import Path
import shlex
import sys
from typing import Annotated, Literal

import tqdm
import tyro
from tyro.conf import Positional

from tritera_jax.cli.arguments import BARE


def evaluate(args: list[str]):
  from tritera_kernels.fused import CacheType
  from tritera_kernels.matmul import Activations

  bar = functools.partial(tqdm.tqdm, unit='batch', leave=False)

  def evaluate(
    path: Positional[Path],
    data: str | None = None,
    split: str | None = None,
    text: tuple[str, ...] = (),
    text_field: str | None = None,
    sequence_length: int | None = None,
    stride: int | None = None,
    tasks: str | None = None,
    include: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    samples: bool = False,
    out: Path | None = None,
    batch_size: int = 16,
    activations: Activations | None = None,
    cache: CacheType | None = None,
    baselines: bool = False,
  ):
    """Loss of a run or a packed model on a split of a dataset, or on text; or
    its scores in tasks of lm-eval.

    Args:
      path: run folder or packed folder.
      data: dataset folder or bucket URL; default: the run's own.
      split: of the dataset; default: validation.
      text: files or folders of text to score, not a dataset.
      text_field: of JSON lines and Parquet files: where they have the text;
        default: text.
      sequence_length: tokens a window; default: the model's context.
      stride: tokens scored a window; default: half a window.
      tasks: names of lm-eval tasks, with commas between them; paper: those of
        Spectra.
      include: folder with YAML files of tasks of your own.
      limit: items a task; default: all.
      shots: examples before each item; default: as the task has them.
      samples: write every item and its answer to --out, too.
      out: JSON file for the results of tasks.
      batch_size: windows at once, or rows.
      activations: of a packed model: float, bfloat16 or int8; default: its
        record's.
      cache: of a packed model, for tasks: bfloat16, int8 or float32, which
        scores as the latents do; default: bfloat16.
      baselines: also gzip, xz and a unigram model on the same split.
    """
    from tritera_jax.eval import baselines as baselines_lib
    from tritera_jax.eval import harness, perplexity
    from tritera_jax.eval import text as text_lib

    sources = {'--data': data, '--text': text, '--tasks': tasks}
    given = [name for name, value in sources.items() if value]
    if len(given) > 1:
      raise ValueError(f'{" and ".join(given)}: one at a time')
    of_tasks = {
      '--include': include,
      '--limit': limit,
      '--shots': shots,
      '--samples': samples,
      '--out': out,
      '--cache': cache,
    }
    of_windows = {'--sequence-length': sequence_length, '--stride': stride}
    of_datasets = {'--split': split, '--baselines': baselines}
    for options, fits, where in (
      (of_tasks, tasks, 'only with --tasks'),
      ({'--text-field': text_field}, text, 'only with --text'),
      (of_windows, not tasks, 'not with --tasks'),
      (of_datasets, not (text or tasks), 'only of a dataset'),
    ):
      # Limits of 0 were given, too.
      stray = [
        name
        for name, value in options.items()
        if value is not None and value is not False
      ]
      if stray and not fits:
        raise ValueError(f'{", ".join(stray)}: {where}')
    for name, value in (of_windows | {'--batch-size': batch_size}).items():
      if value is not None and value < 1:
        raise ValueError(f'{name} {value}: must be at least 1')
    if tasks:
      record = harness.evaluate(
        path,
        tasks.split(','),
        include=include,
        limit=limit,
        shots=shots,
        batch_size=batch_size,
        activations=activations,
        cache=cache,
        samples=samples,
        command=shlex.join(['tritera', 'eval', *args]),
      )
      print(harness.table(record))
      if out is not None:
        harness.write(record, out)
        print(out)
      return
    windows = {
      'sequence_length': sequence_length,
      'stride': stride,
      'batch_size': batch_size,
      'activations': activations,
      'progress': bar,
    }
    if text:
      field = text_field or 'text'
      print(text_lib.evaluate(path, text, text_field=field, **windows))
      return
    split = split or 'validation'
    data = data or perplexity.default_data(path)
    print(perplexity.evaluate(path, data, split=split, **windows))
    if baselines:
      for name, bits in baselines_lib.all_baselines(data, split).items():
        print(f'{name}: {bits:.4f} bits/byte')

  tyro.cli(evaluate, args=args, prog='tritera eval')


def pack(args: list[str]):
  from tritera_jax.checkpoint import pack
  from tritera_jax.checkpoint.packed_file import Head
  from tritera_jax.interop.huggingface import packing
  from tritera_kernels.matmul import Activations

  def run(
    path: Positional[str],
    format: Literal['two_bit', 'base_three'] = 'two_bit',
    out: Path | None = None,
    step: int | None = None,
    activations: Activations | None = None,
    head: Head | None = None,
  ):
    """Packs ternary weights, of a run or straight from a Hugging Face folder.

    Args:
      path: run folder; or, with out, a folder with config.json, safetensors
        and tokenizer.json, or hf://owner/name.
      format: two_bit or base_three.
      out: folder to make; default: RUN/packed/FORMAT.
      step: which checkpoint of a run; default: the newest.
      activations: what the packed model is to be run with: float, bfloat16 or
        int8; default: what the model was trained with.
      head: int8 also rounds head and embedding; default: if activations are.
    """
    how = {'format': format, 'activations': activations, 'head': head}
    if not packing.is_checkpoint(path, out):
      print(pack.pack(path, step=step, out=out, **how))
      return
    if out is None or step is not None:
      raise ValueError(
        f'{path} is a Hugging Face checkpoint: name the folder to make with '
        '--out, and no --step'
      )
    bar = functools.partial(tqdm.tqdm, unit='matrix', leave=False)
    print(packing.pack_checkpoint(path, out, progress=bar, **how))

  tyro.cli(run, args=args, prog='tritera pack')


def quantize(args: list[str]):
  from tritera_jax.quantlm import run as run_lib
  from tritera_jax.quantlm.run import Quantization

  def quantize(
    run: Positional[Path],
    how: Annotated[Quantization, BARE],
    out: Path,
    step: int | None = None,
    batch_size: int = 8,
  ):
    """Quantises a FloatLM's run after training, to a new run folder.

    Args:
      run: run folder.
      how: values and method.
      out: folder to make: a run to score, with a record, quantized.json.
      step: which checkpoint; default: the newest.
      batch_size: windows of text at once.
    """
    report = run_lib.quantize(
      run,
      out,
      how,
      step=step,
      batch_size=batch_size,
      progress=functools.partial(tqdm.tqdm, unit='block', leave=False),
    )
    print(
      f'{report.folder}: {report.bits_per_weight:g} bits/weight, '
      f'{report.size_bits / 1e6:,.1f} Mbit in all'
    )

  tyro.cli(quantize, args=args, prog='tritera quantize')


def generate(args: list[str]):
  from tritera_kernels.fused import CacheType
  from tritera_kernels.matmul import Activations

  def generate(
    path: Positional[Path],
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    seed: int = 0,
    activations: Activations | None = None,
    cache: CacheType | None = None,
    format: Literal['two_bit', 'base_three'] | None = None,
  ):
    """Continues a prompt, or several.

    Args:
      path: run folder or packed folder.
      prompt: text to continue; may be repeated. Without it: stdin or, on a
        terminal, each line typed, until an empty one (Ctrl-C ends a text).
      new_tokens: most tokens to add.
      temperature: 0 takes the most likely token.
      top_k: sample from the k most likely tokens; 0 from all.
      top_p: sample from the most likely tokens of total probability p.
      min_p: sample from tokens at least min_p times as likely as the first.
      repetition_penalty: above 1 makes tokens already there less likely.
      stop: text that ends the continuation, such as $'\\n'; may be repeated.
      seed: of sampling.
      activations: of a packed model: float, bfloat16 or int8; default: its
        record's.
      cache: of a packed model, what keys and values are rounded to: bfloat16,
        int8 or float32 (slow); default: bfloat16.
      format: of a packed model, two_bit or base_three to repack it when it is
        read: two_bit is less work, base_three less memory.
    """
    from tritera_jax.generate import launch

    launch.set_xla_flags()
    from tritera_jax.generate import load, terminal
    from tritera_jax.generate.sampling import Sampling

    terminal.run(
      load.load(path, activations=activations, cache=cache, format=format),
      prompt,
      stdin=sys.stdin,
      write=functools.partial(print, end='', flush=True),
      new_tokens=new_tokens,
      sampling=Sampling(temperature, top_k, top_p, min_p, repetition_penalty),
      seed=seed,
      stop=stop,
    )

  tyro.cli(generate, args=args, prog='tritera generate')


def doctor(args: list[str]):
  def doctor(*, measure: bool = True):
    """Proves the kernels that this machine would use on golden vectors.

    Args:
      measure: time the C++ kernels beside the memory they read, too.
    """
    from tritera_kernels import doctor

    text, healthy = doctor.report(measure=measure)
    print(text)
    if not healthy:
      raise SystemExit(1)

  tyro.cli(doctor, args=args, prog='tritera doctor')
