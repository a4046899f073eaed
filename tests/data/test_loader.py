# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
import hashlib
import itertools
import time
import weakref

import numpy as np
import pytest
import tensorstore as ts

from tritera_jax.data import loader, shards
from tritera_jax.data.mixture import Mixture


@pytest.fixture
def source(tmp_path) -> shards.TokenSource:
  """Tokens 0..99 over three shards: a token is its own position."""
  entries = [
    shards.write_shard(
      tmp_path, f'train/{i:05}', np.arange(a, b, dtype=np.uint16),
      np.array([b - a]), b - a,
    )
    for i, (a, b) in enumerate([(0, 33), (33, 34), (34, 100)])
  ]  # fmt: skip
  shards.write_manifest(
    tmp_path,
    shards.Manifest('none', 200, 199, 'uint16', {'train': entries}, {}),
  )
  return shards.open_split(tmp_path, 'train')


def test_reading_crosses_shards(source):
  for start, stop in ((0, 100), (30, 40), (33, 34), (50, 50), (99, 100)):
    np.testing.assert_array_equal(
      source.read(start, stop), np.arange(start, stop)
    )
  with pytest.raises(IndexError, match='tokens 90..101 of a split of 100'):
    source.read(90, 101)


def make(source, seed=0, batch_size=4):
  return loader.batches(
    [source], batch_size=batch_size, sequence_length=8, seed=seed
  )


def test_every_window_comes_once_an_epoch_in_a_new_order(source):
  # Windows of 9 tokens that start every 8: (100 - 1) // 8 = 12 of them.
  batches = make(source)
  epochs = []
  for epoch in range(3):
    rows = np.concatenate([batches[3 * epoch + i]['tokens'] for i in range(3)])
    assert rows.dtype == np.int32 and rows.shape == (12, 9)
    np.testing.assert_array_equal(rows - rows[:, :1], [np.arange(9)] * 12)
    assert sorted(rows[:, 0]) == list(range(0, 96, 8))
    epochs.append(tuple(rows[:, 0]))
  assert len(set(epochs)) == 3


def test_batch_n_is_a_function_of_seed_and_n(source):
  first, again, other = make(source), make(source), make(source, seed=1)
  for n in (0, 5, 1000, 2**31):
    np.testing.assert_array_equal(first[n]['tokens'], again[n]['tokens'])
  assert any((first[n]['tokens'] != other[n]['tokens']).any() for n in range(3))
  got = itertools.islice(loader.iterate(first, 7), 10)
  for n, batch in enumerate(got, 7):
    np.testing.assert_array_equal(batch['tokens'], first[n]['tokens'])


@pytest.mark.parametrize('prefetch', [0, 1, 20])
def test_reading_ahead_changes_nothing(source, prefetch):
  batches = make(source)
  got = itertools.islice(loader.iterate(batches, 2, prefetch=prefetch), 9)
  for n, batch in enumerate(got, 2):
    np.testing.assert_array_equal(batch['tokens'], batches[n]['tokens'])


@pytest.mark.parametrize('rows', [
  slice(0, 3), slice(3, 5), slice(2, None), slice(1, None, 2), slice(None),
])  # fmt: skip
def test_a_host_reads_its_rows_of_the_global_batch_only(source, rows):
  whole = make(source, batch_size=5)
  part = loader.batches(
    [source], batch_size=5, sequence_length=8, seed=0, rows=rows
  )
  steps, starts = source.steps, []
  source.steps = lambda a, b: (starts.append(a), steps(a, b))[1]
  for n in (0, 2, 7):  # batch 2 spans epochs: 12 windows in batches of 5
    expected = whole[n]['tokens'][rows]
    starts.clear()
    np.testing.assert_array_equal(part[n]['tokens'], expected)
    assert starts == expected[:, 0].tolist()  # a token is its position
  ahead = next(loader.iterate(part, 7))['tokens']
  np.testing.assert_array_equal(ahead, whole[7]['tokens'][rows])


@pytest.mark.parametrize(('changes', 'message'), [
  ({'sequence_length': 100}, 'needs at least 101 tokens'),
  ({'sequence_length': 0}, 'data.sequence_length=0 must be at least 1'),
  ({'batch_size': 0}, 'data.batch_size=0 must be at least 1'),
  ({'rows': slice(4, 8)}, 'are none of data.batch_size=4'),
])  # fmt: skip
def test_batches_that_cannot_be_are_refused(source, changes, message):
  arguments = {'batch_size': 4, 'sequence_length': 8, 'seed': 0} | changes
  with pytest.raises(ValueError, match=message):
    loader.batches([source], **arguments)


@pytest.mark.parametrize(('T', 'stride'), [
  (8, 8), (8, 4), (8, 1), (16, 5), (100, 50), (128, 64), (99, 3),
])  # fmt: skip
@pytest.mark.parametrize('limit', [None, 50, 1])
def test_evaluation_scores_every_token_once_with_enough_context(
  source, T, stride, limit
):
  inputs, targets, weights = loader.windows(source, T, stride, limit)
  assert inputs.shape == targets.shape == weights.shape
  scored = [
    (int(targets[w, t]), t)
    for w, t in np.argwhere(weights > 0)
  ]  # fmt: skip
  assert [token for token, _ in scored] == list(range(limit or 100))
  assert all(t >= min(token, T - stride) for token, t in scored)
  for w, t in np.argwhere(weights > 0):
    before = [199, *range(100)][: targets[w, t] + 1]
    np.testing.assert_array_equal(inputs[w, : t + 1], before[-(t + 1) :])


def test_a_stride_past_the_window_is_refused(source):
  with pytest.raises(ValueError, match=r'stride=9 must lie in 1..'):
    loader.windows(source, 8, 9)


@pytest.fixture
def mixed(source, tmp_path):
  """A second source: tokens 100..139, so 4 windows of 9 every 8."""
  entry = shards.write_shard(
    tmp_path / 'b', 'train/00000', np.arange(100, 140, dtype=np.uint16),
    np.array([40]), 40,
  )  # fmt: skip
  shards.write_manifest(
    tmp_path / 'b',
    shards.Manifest('none', 200, 199, 'uint16', {'train': [entry]}, {}),
  )
  return [source, shards.open_split(tmp_path / 'b', 'train')]


def test_sources_are_mixed_by_weight_each_in_its_own_epochs(mixed):
  batches = loader.batches(
    mixed, ((0, (3, 1)),), batch_size=4, sequence_length=8, seed=0
  )
  starts = np.concatenate([batches[n]['tokens'][:, 0] for n in range(96)])
  of_first, of_second = starts[starts < 100], starts[starts >= 100]
  assert (len(of_first), len(of_second)) == (288, 96)
  # The mixture holds all along, not only in the end.
  for n in range(0, 384, 16):
    assert np.count_nonzero(starts[n : n + 16] < 100) == 12
  # Whole epochs, one after the other, in changing orders: 12 and 4 windows.
  for rows, count in ((of_first, 12), (of_second, 4)):
    epochs = rows.reshape(-1, count)
    assert (np.sort(epochs, axis=1) == np.unique(rows)).all()
    assert len(np.unique(epochs, axis=0)) > len(epochs) // 3
  assert loader.epochs(mixed, ((0, (3, 1)),), 96, 4, 8) == [24, 24]


def test_a_batch_of_a_mixture_is_a_function_of_seed_and_n(mixed):
  make = lambda rows: loader.batches(
    mixed, ((0, (7, 3)),), batch_size=4, sequence_length=8, seed=5, rows=rows
  )
  whole, half = make(slice(None)), make(slice(2, 4))
  for n in (0, 17, 2**40):
    np.testing.assert_array_equal(half[n]['tokens'], whole[n]['tokens'][2:])


def test_more_shares_than_sources_are_refused(source):
  with pytest.raises(ValueError, match='1 sources have 2 shares'):
    loader.batches(
      [source], ((0, (1, 1)),), batch_size=4, sequence_length=8, seed=0
    )


@pytest.fixture
def three(mixed, source):
  """The third has the tokens of the first: only its number tells it apart."""
  return [*mixed, source]


# Re-weighted at batch 3, when the third joins, and at 11.
SCHEDULE = ((0, (2, 1, 0)), (3, (1, 3, 4)), (11, (0, 1, 0)), (12, (5, 4, 1)))


def test_each_source_goes_on_from_its_position_when_weights_change(three):
  """What it gives is what it would give alone, whoever comes between."""
  make = lambda schedule: loader.batches(
    three, schedule, batch_size=6, sequence_length=8, seed=3
  )
  mixture = Mixture(SCHEDULE, 6)
  streams = [[], [], []]
  for n in range(40):
    for row, tokens in enumerate(make(SCHEDULE)[n]['tokens']):
      streams[mixture.locate(6 * n + row)[0]].append(tokens[0])
  assert [len(stream) for stream in streams] == mixture.counts(240)
  for number, stream in enumerate(streams):
    alone = make(((0, [int(i == number) for i in range(3)]),))
    rows = [alone[n]['tokens'][:, 0] for n in range(len(stream) // 6 + 1)]
    assert stream == np.concatenate(rows)[: len(stream)].tolist()
  assert streams[0][:12] != streams[2][:12]
  counts = loader.epochs(three, SCHEDULE, 40, 6, 8)
  assert counts == [
    len(s) / w for s, w in zip(streams, (12, 4, 12), strict=True)
  ]


def test_the_tokens_are_the_same_for_every_number_of_hosts(three):
  """Also where the number changes on the way, as when a run is resumed."""

  def digests(hosts: Callable[[int], int], steps: range) -> list[str]:
    found = []
    for n in steps:
      share = 8 // hosts(n)
      parts = [
        loader.batches(
          three, SCHEDULE, batch_size=8, sequence_length=8, seed=0,
          rows=slice(h * share, (h + 1) * share),
        )[n]['tokens']
        for h in range(hosts(n))
      ]  # fmt: skip
      found.append(hashlib.sha256(np.concatenate(parts)).hexdigest())
    return found

  for steps in (range(20), range(2**40, 2**40 + 3)):
    want = digests(lambda n: 1, steps)
    assert len(set(want)) == len(want)
    for hosts in (2, 4, 8):
      assert digests(lambda n, hosts=hosts: hosts, steps) == want
    assert digests(lambda n: (4, 2, 8, 1)[n // 3 % 4], steps) == want


def test_few_arrays_are_open_at_once(tmp_path, monkeypatch):
  monkeypatch.setattr(shards, '_OPEN', 4)
  entries = [
    shards.write_shard(
      tmp_path, f'train/{i:05}', np.full(10, i, np.uint16), np.array([10]), 10
    )
    for i in range(20)
  ]  # fmt: skip
  manifest = shards.Manifest('none', 50, 49, 'uint16', {'train': entries}, {})
  source = shards.TokenSource(tmp_path, manifest, 'train')
  opened = []
  monkeypatch.setattr(
    ts, 'open', lambda *a, _open=ts.open, **k: (
      opened.append(weakref.ref(future := _open(*a, **k))), future
    )[1]
  )  # fmt: skip
  for start in range(0, 200, 10):
    assert source.read(start, start + 10).tolist() == [start // 10] * 10
  assert len(opened) == 20
  assert sum(future() is not None for future in opened) <= 4
  source.read(160, 200)
  assert len(opened) == 20  # the last four are open still


def test_what_is_waited_for_is_named_with_its_time(mixed, monkeypatch):
  first, second = mixed
  assert loader.waiting(mixed) == []
  [stuck, done] = [ts.Promise.new(), ts.Promise.new()]
  promises = iter([stuck[1], done[1], stuck[1]])
  clock = [100.0]
  monkeypatch.setattr(time, 'monotonic', lambda: clock[0])
  monkeypatch.setattr(shards.ts, 'open', lambda *a, **k: next(promises))
  readings = [s.steps(0, 9) for s in (first, second)] + [first.steps(33, 34)]
  for clock[0], reading in zip((100.0, 102.0, 103.0), readings, strict=True):
    next(reading)
  clock[0] = 107.5
  root, other = first.root, second.root
  assert loader.waiting(mixed) == [
    (f'{root}/train/00000.tokens.zarr3', 7.5),
    (f'{other}/train/00000.tokens.zarr3', 5.5),
    (f'{root}/train/00001.tokens.zarr3', 4.5),
  ]
  done[0].set_result(None)
  assert len(loader.waiting(mixed)) == 2
  for reading in readings:
    reading.close()
  assert loader.waiting(mixed) == []


def test_a_shard_that_cannot_be_read_is_named(mixed):
  file = mixed[1].root / 'train/00000.tokens.zarr3/c/0'
  file.write_bytes(file.read_bytes()[:-1])
  with pytest.raises(ValueError, match=r'/b/train/00000\.tokens\.zarr3: .*'):
    loader.batches(
      mixed, ((0, (1, 1)),), batch_size=4, sequence_length=8, seed=0
    )[0]
  assert loader.waiting(mixed) == []
