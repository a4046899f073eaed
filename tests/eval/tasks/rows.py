# SPDX-License-Identifier: Apache-2.0
"""The rows beside this file, as lm-eval takes them."""

import json
from pathlib import Path

import datasets


def _rows(name: str) -> datasets.DatasetDict:
  lines = (Path(__file__).parent / name).read_text().splitlines()
  rows = datasets.Dataset.from_list([json.loads(line) for line in lines])
  return datasets.DatasetDict({'test': rows})


def next_line(**_) -> datasets.DatasetDict:
  return _rows('next_line.jsonl')


def pages(**_) -> datasets.DatasetDict:
  return _rows('pages.jsonl')


def rest_of_line(**_) -> datasets.DatasetDict:
  return _rows('rest_of_line.jsonl')
