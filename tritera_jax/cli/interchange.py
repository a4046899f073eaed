# SPDX-License-Identifier: Apache-2.0
"""Verbs between runs and files of other systems."""

import argparse
import functools
from pathlib import Path
from typing import Literal

import tqdm
import tyro
from tyro.conf import Positional


def import_run(args: list[str]):
  from tritera_jax.interop.huggingface import importing

  def run(
    path: Positional[str],
    out: Path,
    weights: importing.Weights | None = None,
    dtype: Literal['float32', 'bfloat16'] | None = None,
    activation_bits: Literal[8] | None = None,
  ):
    """Makes a run folder of a Hugging Face checkpoint.

    Args:
      path: folder with config.json, safetensors and tokenizer.json, or
        hf://owner/name or hf://owner/name@revision.
      out: folder to make: a run to score, pack, export or start from.
      weights: what matrices hold: ternary, latents (which take any floats, to
        train on as a ternary model) or float; default: as the files say,
        or as all matrices look.
      dtype: compute dtype of the run; default: float32.
      activation_bits: 8: matrices take int8 activations, for latents whose
        config.json does not say so.
    """
    report = importing.import_run(
      path,
      out,
      weights=weights,
      dtype=dtype,
      activation_bits=activation_bits,
      progress=functools.partial(tqdm.tqdm, unit='tensor', leave=False),
    )
    print(
      f'{report.folder}: {report.architecture}, {report.weights} weights'
      f'{f", {report.fingerprint}" if report.fingerprint else ""}'
    )
    if report.rounded:
      print(
        f'{report.rounded} matrices have scales that no latents have; the run '
        f'has the nearest, {report.ulps} in the last place of a float32 off at '
        'most. `tritera pack` of the checkpoint itself keeps every scale'
      )

  tyro.cli(run, args=args, prog='tritera import')


def export(args: list[str]):
  kinds = {'hf': _export_hf, 'gguf': _export_gguf}
  # Each kind has options of its own, and tells them.
  chooser = argparse.ArgumentParser(
    'tritera export RUN --out PATH',
    add_help=False,
    allow_abbrev=False,
    epilog='--to hf --help and --to gguf --help tell their options',
  )
  chooser.add_argument('--to', choices=kinds, required=True)
  chosen = any(arg.split('=')[0] == '--to' for arg in args)
  if not chosen and {'-h', '--help'} & set(args):
    chooser.print_help()
    raise SystemExit(0)
  kind, rest = chooser.parse_known_args(args)
  kinds[kind.to](rest)


def _export_hf(args: list[str]):
  from tritera_jax.interop.huggingface import to_huggingface

  def run(
    run: Positional[Path],
    out: Path,
    dtype: to_huggingface.Dtype = 'float32',
    form: to_huggingface.Form = 'unpacked',
    step: int | None = None,
    licence: str = 'unknown',
  ):
    """Writes a run as a folder that Hugging Face's transformers loads.

    Args:
      run: run folder.
      out: folder to make.
      dtype: of its tensors; float32 alone is exact.
      form: unpacked, ternary values as floats; or, for models with int8
        activations and one scale a matrix, packed, 2 bits a weight, or
        latents, to be trained on.
      step: which checkpoint; default: the newest.
      licence: of the model, for its card, such as apache-2.0.
    """
    print(
      to_huggingface.export(
        run, out, dtype=dtype, form=form, step=step, licence=licence
      )
    )

  tyro.cli(run, args=args, prog='tritera export --to hf')


def _export_gguf(args: list[str]):
  from tritera_jax.interop.gguf import tensor_plan, to_gguf, tokenizer_keys

  def run(
    run: Positional[Path],
    out: Path,
    types: tensor_plan.Types,
    otherwise: tensor_plan.Otherwise | None = None,
    embedding: tensor_plan.FloatTypes = 'f16',
    head: tensor_plan.FloatTypes = 'f16',
    step: int | None = None,
    pre: tokenizer_keys.Pre | None = None,
    sample: Path | None = None,
    end: str | None = None,
    licence: str | None = None,
  ):
    """Writes a run as a GGUF file that llama.cpp runs.

    Args:
      run: run folder.
      out: file to make.
      types: of the blocks' matrices: tq1_0, tq2_0 or q2_0; of a FloatLM f16 or
        f32.
      otherwise: of a matrix that types cannot hold; default: refuse it.
      embedding: type of the token embedding.
      head: type of the output matrix.
      step: which checkpoint; default: the newest.
      pre: llama.cpp's rule for cutting text, where none is the tokenizer's own.
      sample: text on which to try pre; default: held-out text of the run's.
      end: token that ends a document; default: as the run says, or else
        <|endoftext|>, <|end_of_text|> or </s>.
      licence: of the model, such as apache-2.0.
    """
    print(
      to_gguf.export(
        run,
        out,
        types=types,
        otherwise=otherwise,
        embedding=embedding,
        head=head,
        step=step,
        pre=pre,
        sample=sample,
        end=end,
        licence=licence,
      )
    )

  tyro.cli(run, args=args, prog='tritera export --to gguf')


def verify(args: list[str]):
  from tritera_jax.interop import verify as verify_lib

  def verify(a: Positional[Path], b: Positional[Path]):
    """Proves that two artefacts hold the same trits and scales.

    Each is a run, a packed folder, a Hugging Face folder or a GGUF file.
    Exits with 1 at the first difference, and says where it is.

    Args:
      a: one.
      b: the other.
    """
    bar = functools.partial(tqdm.tqdm, unit='matrix', leave=False)
    print(verify_lib.verify(a, b, progress=bar))

  tyro.cli(verify, args=args, prog='tritera verify')
