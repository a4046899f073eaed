# SPDX-License-Identifier: Apache-2.0
"""The collectives of a compiled program: what each device sends, in bytes.

  found = collectives.of(jax.jit(f).lower(x).compile())
  collectives.bytes_per_device(found)   {'all-gather': 896, ...}

They are read from the optimised HLO, so that they are what the partitioner and
the passes after it made, on whatever platform it was compiled for. Bytes are
those of the bandwidth-optimal algorithms, which a ring is and which send as
much as they receive. With n devices in a group and b bytes of result on one:

  all-gather           b (n - 1) / n     reduce-scatter   b (n - 1)
  all-reduce         2 b (n - 1) / n     all-to-all       b (n - 1) / n
  collective-permute   b                 collective-broadcast   b

A compiler may choose another algorithm for a small message, and a network may
reduce inside its switches: an estimate of time wants a measurement.
"""

from collections.abc import Iterable, Iterator
import math
import re
from typing import Literal, NamedTuple

import jax
import numpy as np

Op = Literal[
  'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all',
  'ragged-all-to-all', 'collective-permute', 'collective-broadcast',
]  # fmt: skip
OPS: tuple[Op, ...] = Op.__args__  # type: ignore[attr-defined]

_INSTRUCTION = re.compile(r'\s+(ROOT )?%?([\w.\-]+) = (.*)')
_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\{$')
_ARRAY = re.compile(r'([a-z]+\d*\w*)\[([\d,]*)\]')
_CALLED = re.compile(
  r'(?:calls|to_apply|body|condition|true_computation|false_computation)='
  r'%?([\w.\-]+)|(?:branch_computations|called_computations)=\{([^}]*)\}'
)


class Shape(NamedTuple):
  """An array's dtype, by HLO's name, and its dimensions."""

  dtype: str
  dimensions: tuple[int, ...]

  @property
  def bytes(self) -> int:
    bits = re.search(r'\d+', self.dtype)  # f8e4m3fn has 8, pred has none
    width = int(bits[0]) if bits else 8
    return -(-math.prod(self.dimensions) * width // 8)


class Collective(NamedTuple):
  """One collective instruction of a program.

  Attributes:
    op: HLO's name, whether it is asynchronous or not.
    results: arrays that one device has of it.
    groups: the devices that take part with each other, as positions in the
      program's device assignment: those of `Mesh.devices.flat`. Of a permute,
      (from, to).
    times: how often a run of the program executes it.
    source: name of the JAX operation that it comes from, '' if unknown.
  """

  op: Op
  results: tuple[Shape, ...]
  groups: tuple[tuple[int, ...], ...]
  times: int
  source: str

  @property
  def bytes(self) -> int:
    """Sent by a device in one execution."""
    size = sum(shape.bytes for shape in self.results)
    if self.op == 'collective-permute':
      return size if any(a != b for a, b in self.groups) else 0
    n = max(len(group) for group in self.groups)
    if n == 1:
      return 0
    if self.op == 'collective-broadcast':
      return size
    if self.op == 'reduce-scatter':
      return size * (n - 1)
    return -(-size * (n - 1) * (2 if self.op == 'all-reduce' else 1) // n)


def bytes_per_device(found: Iterable[Collective]) -> dict[str, int]:
  """Bytes that a device sends in a run of the program, by kind of collective.

  A device that has no part in a group is counted as those that have.
  """
  sums: dict[str, int] = {}
  for one in found:
    sums[one.op] = sums.get(one.op, 0) + one.bytes * one.times
  return {op: sum for op, sum in sums.items() if sum}


def of(program: jax.stages.Compiled | str) -> list[Collective]:
  """Every collective of a compiled program, or of its `as_text()`.

  What a loop holds counts as often as the loop runs. Of a conditional, every
  branch counts.

  Raises:
    ValueError: a loop holds collectives and does not say how often it runs.
  """
  text = program if isinstance(program, str) else program.as_text()
  assert text is not None  # every backend of ours prints its programs
  return list(_Program(text).found())


class _Instruction(NamedTuple):
  name: str
  type: str  # as text: an array, or a tuple in parentheses
  opcode: str
  rest: str  # operands and attributes

  @property
  def operands(self) -> list[str]:
    inside = re.sub(r'/\*.*?\*/', '', self.rest[: _closing(self.rest, 0)])
    return re.findall(r'%?([\w.\-]+)\s*(?:,|$)', inside[1:])

  @property
  def called(self) -> list[str]:
    names = []
    for one, several in _CALLED.findall(self.rest):
      names += [one] if one else re.findall(r'[\w.\-]+', several)
    return names


class _Program:
  """Computations by name; each a list of instructions, its root the last."""

  def __init__(self, text: str):
    self.computations: dict[str, list[_Instruction]] = {}
    self.entry, body = '', []
    for line in text.splitlines():
      if header := _COMPUTATION.match(line):
        body = self.computations[header[2]] = []
        self.entry = header[2] if header[1] else self.entry
      elif found := _INSTRUCTION.match(line):
        body.append(_instruction(found[2], found[3]))
    count = lambda name: re.search(rf'{name}=(\d+)', text.split('\n', 1)[0])
    sizes = [count('num_partitions'), count('replica_count')]
    self.devices = math.prod(int(size[1]) for size in sizes if size)

  def found(self) -> Iterator[Collective]:
    yield from self._inside(self.entry, 1)

  def _inside(self, computation: str, times: int) -> Iterator[Collective]:
    chains = set()
    for instruction in self.computations[computation]:
      op = instruction.opcode.removesuffix('-start')
      if op in OPS:
        yield self._collective(op, instruction, times)
      elif instruction.opcode in ('async-done', 'async-update'):
        continue  # they name what their start has named
      elif instruction.opcode == 'while':
        inside = [
          one
          for name in instruction.called
          for one in self._inside(name, times)
        ]
        if inside:
          trips = self._trips(computation, instruction)
          yield from (one._replace(times=one.times * trips) for one in inside)
      elif instruction.opcode == 'fusion':
        yield from self._fused(instruction, times, chains)
      else:
        for name in instruction.called:
          yield from self._inside(name, times)

  def _fused(self, fusion, times, chains: set[str]) -> Iterator[Collective]:
    """TPUs have two kinds of fusion around a collective.

    A reduce-scatter is an all-reduce and a slice of it. An asynchronous one is
    a chain of fusions, which each name it again: it counts once.
    """
    (name,) = fusion.called
    for instruction in self.computations[name]:
      op = instruction.opcode.removesuffix('-start')
      if op in OPS:
        chain = re.search(r'chain_id="\w+"', instruction.rest)
        if chain and chain[0] in chains:
          continue
        if chain:
          chains.add(chain[0])
        one = self._collective(op, instruction, times)
        if name.startswith('all-reduce-scatter'):
          results = _shapes(fusion.type)
          one = one._replace(op='reduce-scatter', results=results)
        yield one
      elif instruction.opcode == 'fusion':
        yield from self._fused(instruction, times, chains)

  def _collective(self, op, instruction, times) -> Collective:
    type = instruction.type
    # A start has a tuple of operands and results, but an all-reduce's.
    if instruction.opcode.endswith('-start') and op != 'all-reduce':
      type = _elements(type)[1]
    if op == 'collective-permute':
      pairs = re.search(r'source_target_pairs=\{(.*?)\}\}', instruction.rest)
      groups = _explicit(pairs[1] + '}') if pairs else ()
    else:
      attribute = re.search(r'replica_groups=(.*)', instruction.rest)
      groups = _groups(attribute[1] if attribute else '', self.devices)
    source = re.search(r'op_name="([^"]*)"', instruction.rest)
    return Collective(
      op, _shapes(type), groups, times, source[1] if source else ''
    )

  def _trips(self, computation: str, loop: _Instruction) -> int:
    """How often a loop runs: as XLA says, or by its own counter."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
      return int(known[1])
    condition = re.search(r'condition=%?([\w.\-]+)', loop.rest)
    if condition:
      bound = self._bound(condition[1])
      if bound:
        index, last = bound
        first = self._constant(computation, loop.operands[0], index)
        if first is not None:
          return max(last - first, 0)
    raise ValueError(
      f'the loop {loop.name} holds collectives, but the compiled program does '
      'not say how often it runs; give it a fixed number of iterations '
      '(lax.scan, or lax.fori_loop with constant bounds)'
    )

  def _bound(self, condition: str) -> tuple[int, int] | None:
    """(index, bound) of a condition state[index] < bound: JAX's counted loops,
    whose counters go by one."""
    body = {one.name: one for one in self.computations[condition]}
    root = self.computations[condition][-1]
    if root.opcode != 'compare' or 'direction=LT' not in root.rest:
      return None
    counter, bound = (body.get(name) for name in root.operands)
    if counter is None or bound is None or bound.opcode != 'constant':
      return None
    index = re.search(r'index=(\d+)', counter.rest)
    last = re.match(r'\((-?\d+)\)', bound.rest)
    return (int(index[1]), int(last[1])) if index and last else None

  def _constant(self, computation: str, name: str, index: int) -> int | None:
    """Element `index` of a tuple, if it is a constant."""
    body = {one.name: one for one in self.computations[computation]}
    one = body.get(name)
    if one is None or one.opcode != 'tuple':
      return None
    one = body.get(one.operands[index])
    while one is not None and one.opcode in ('copy', 'bitcast'):
      one = body.get(one.operands[0])
    if one is None or one.opcode != 'constant':
      return None
    value = re.match(r'\((-?\d+)\)', one.rest)
    return int(value[1]) if value else None


def _closing(text: str, start: int) -> int:
  """Where the parenthesis that opens at `start` closes."""
  depth = 0
  for place in range(start, len(text)):
    depth += (text[place] == '(') - (text[place] == ')')
    if not depth:
      return place
  raise ValueError(f'no closing parenthesis in {text[start : start + 80]!r}')


def _instruction(name: str, text: str) -> _Instruction:
  end = _closing(text, 0) + 1 if text[0] == '(' else text.index(' ')
  opcode, rest = text[end:].strip().split('(', 1)
  return _Instruction(name, text[:end], opcode, '(' + rest)


def _shapes(type: str) -> tuple[Shape, ...]:
  return tuple(
    Shape(dtype, tuple(int(n) for n in dimensions.split(',') if n))
    for dtype, dimensions in _ARRAY.findall(type)
  )


def _elements(type: str) -> list[str]:
  """The elements of a tuple's type."""
  depth, elements = 0, ['']
  for character in type[1:-1]:
    depth += (character in '([{') - (character in ')]}')
    if character == ',' and not depth:
      elements.append('')
    else:
      elements[-1] += character
  return elements


def _groups(text: str, devices: int) -> tuple[tuple[int, ...], ...]:
  """Replica groups in any of HLO's notations, at the start of `text`."""
  if text.startswith('mesh['):
    return _of_mesh(text)
  if text.startswith('['):
    return _rows(_iota(text))
  explicit = re.match(r'\{(\{.*?\})\}', text)
  return _explicit(explicit[1]) if explicit else (tuple(range(devices)),)


def _explicit(text: str) -> tuple[tuple[int, ...], ...]:
  """{0,1},{2,3}"""
  return tuple(
    tuple(int(n) for n in group.split(','))
    for group in re.findall(r'\{([\d,]+)\}', text)
  )


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(',')]


def _iota(text: str) -> np.ndarray:
  """[2,4]<=[4,2]T(1,0): 0..7 as [4, 2], transposed, as [2, 4]."""
  found = re.match(r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
  assert found is not None, text
  whole = np.arange(math.prod(_numbers(found[2]))).reshape(_numbers(found[2]))
  if found[3]:
    whole = whole.transpose(_numbers(found[3]))
  return whole.reshape(_numbers(found[1]))


def _of_mesh(text: str) -> tuple[tuple[int, ...], ...]:
  """mesh['a'=2,'b'=8] {'b':(2)4}: groups over the last 4 of b's 2 x 4."""
  found = re.match(
    r'mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}(?:,|$)', text
  )
  assert found is not None, text
  sizes = {
    name: int(size) for name, size in re.findall(r"'?(\w+)'?=(\d+)", found[1])
  }
  ids = np.arange(math.prod(sizes.values()))
  if found[2]:
    listed = found[2]
    ids = _iota(listed) if '<=' in listed else np.array(_numbers(listed))
  # Each axis as (outer, taken, inner); one that is not named is all outer.
  taken = {name: (size, 1, 1) for name, size in sizes.items()}
  for name, before, part in re.findall(
    r"'?(\w+)'?(?::\((\d+)\)(\d+))?", found[3]
  ):
    outer, size = (int(before), int(part)) if part else (1, sizes[name])
    taken[name] = (outer, size, sizes[name] // (outer * size))
  ids = ids.reshape([n for axis in taken.values() for n in axis])
  middle = range(1, ids.ndim, 3)
  ids = np.moveaxis(ids, middle, range(-len(middle), 0))
  return _rows(ids.reshape(-1, math.prod(axis[1] for axis in taken.values())))


def _rows(array: np.ndarray) -> tuple[tuple[int, ...], ...]:
  return tuple(tuple(int(n) for n in row) for row in array)
