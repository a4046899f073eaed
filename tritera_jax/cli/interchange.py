# SPDX-License-Identifier: Apache-2.0
"""Verbs between runs and files of other systems."""

import functools
from pathlib import Path
from typing import Literal

import tqdm
import tyro
from tyro.conf import Positional


def import_run(args: list[str]):
  from tritera_jax.interop import importing

  def run(
    path: Positional[str],
    out: Path,
    weights: importing.Weights | None = None,
    dtype: Literal['float32', 'bfloat16'] | None = None,
  ):
    """Makes a run folder of a Hugging Face checkpoint.

    Args:
      path: folder with config.json, safetensors and tokenizer.json, or
        hf://owner/name or hf://owner/name@revision.
      out: folder to make: a run to score, pack, export or start from.
      weights: what matrices hold: ternary, latents (which take any floats, to
        train on as a ternary model) or float; default: as the files say.
      dtype: compute dtype of the run; default: float32.
    """
    report = importing.import_run(
      path,
      out,
      weights=weights,
      dtype=dtype,
      progress=functools.partial(tqdm.tqdm, unit='tensor', leave=False),
    )
    print(
      f'{report.folder}: {report.architecture}, {report.weights} weights'
      f'{f", {report.fingerprint}" if report.fingerprint else ""}'
    )
    if report.rounded:
      print(
        f'{report.rounded} matrices have another scale than the source, by '
        'at most 4 units in the last place of a float32'
      )

  tyro.cli(run, args=args, prog='tritera import')


def export(args: list[str]):
  from tritera_jax.interop import to_huggingface

  def export(
    run: Positional[Path],
    to: Literal['hf'],
    out: Path,
    dtype: to_huggingface.Dtype = 'float32',
    form: to_huggingface.Form = 'unpacked',
    step: int | None = None,
    licence: str = 'unknown',
  ):
    """Writes a run for other systems; what they compute otherwise is refused.

    Args:
      run: run folder.
      to: hf, a folder that Hugging Face's transformers loads as it is.
      out: folder to make.
      dtype: of its tensors; float32 alone is exact.
      form: unpacked, ternary values as floats, or packed, 2 bits a weight, for
        models with int8 activations and one scale a matrix.
      step: which checkpoint; default: the newest.
      licence: of the model, for its card, such as apache-2.0.
    """
    print(
      to_huggingface.export(
        run, out, dtype=dtype, form=form, step=step, licence=licence
      )
    )

  tyro.cli(export, args=args, prog='tritera export')
