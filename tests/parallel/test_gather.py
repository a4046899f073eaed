# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ternary import oracle
from tests.train import test_step
from tritera_jax.parallel import collectives, gather, rules
from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.parallel.mesh import MeshConfig
from tritera_jax.ternary import layers, quantize
from tritera_jax.train import step

MESHES = {
  'fsdp': MeshConfig(fsdp=8),
  'all': MeshConfig(data=2, fsdp=2, tensor=2),
  'tensor': MeshConfig(fsdp=2, tensor=4),
}
AXES = {'out': ('embed', 'heads'), 'in': ('mlp', 'embed')}


def bytes_by_hand(codes_kn, axis):
  """Byte p: codes p, P + p, 2P + p, 3P + p along the axis, the first lowest."""
  codes = np.moveaxis(codes_kn, axis, 0)
  P = -(-len(codes) // 4)
  filled = np.zeros((4 * P, *codes.shape[1:]), int)
  filled[: len(codes)] = codes
  packed = np.tensordot(4 ** np.arange(4), filled.reshape(4, P, -1) + 1, 1)
  packed = packed.reshape(P, *codes.shape[1:])
  return np.moveaxis(packed, 0, axis).astype(np.uint8)


@pytest.mark.parametrize('axes', AXES.values(), ids=AXES)
@pytest.mark.parametrize('config', MESHES.values(), ids=MESHES)
# A device has whole bytes of the one, and of the other 10 codes or 5.
@pytest.mark.parametrize('shape', [(48, 32), (40, 40)])
# 8 devices in one stage, or four and two.
@pytest.mark.parametrize('ring', [16, 4])
def test_codes_are_packed_where_they_lie_and_arrive_everywhere(
  axes, config, shape, ring, monkeypatch
):
  monkeypatch.setattr(gather, 'RING', ring)
  codes = np.random.default_rng(0).integers(-1, 2, shape, np.int8)
  mesh = mesh_lib.make_mesh(config)
  with jax.set_mesh(mesh):
    way = gather.exchange('two_bit', axes)
    assert way is not None
    lies = rules.shardings(mesh, axes)
    send = jax.jit(way.pack, in_shardings=lies).lower(codes).compile()
    packed = send(jax.device_put(codes, lies))
    receive = jax.jit(lambda p: way.gather(p, shape)).lower(packed).compile()
    arrived = receive(packed)
  np.testing.assert_array_equal(arrived, codes)
  fsdp, tensor = mesh.shape['fsdp'], mesh.shape['tensor']
  split = axes.index('embed')
  for shard in arrived.addressable_shards:
    assert shard.data.shape[split] == shape[split]
    assert shard.data.shape[1 - split] == shape[1 - split] // tensor
  placed = lies.addressable_devices_indices_map(shape)
  for shard in packed.addressable_shards:
    np.testing.assert_array_equal(
      shard.data, bytes_by_hand(codes[placed[shard.device]], 1 - split)
    )
  # A quarter of a byte each, and none of it for what is on the device.
  held = -(-shape[1 - split] // tensor // 4) * shape[split]
  assert collectives.bytes_per_device(collectives.of(receive)) == {
    'all-gather': held * (fsdp - 1) // fsdp
  }
  assert collectives.of(send) == []


@pytest.mark.parametrize('kind', ['bfloat16', 'two_bit'])
@pytest.mark.parametrize('axis', AXES)
@pytest.mark.parametrize('family', ['ternary', 'binary'])
@pytest.mark.parametrize('blocks', [1, 2])
def test_a_layer_multiplies_the_papers_matrix_and_derives_its(
  kind, axis, family, blocks
):
  rng = np.random.default_rng(1)
  w_KN = (0.02 * rng.standard_normal((40, 24))).astype(np.float32)
  x, dy = (rng.standard_normal((16, n)).astype(np.float32) for n in w_KN.shape)
  mesh = mesh_lib.make_mesh(MESHES['all'])

  def both(x, w, dy):
    way = gather.exchange(kind, AXES[axis])
    y, pullback = jax.vjp(
      lambda x, w: layers.straight_through_matmul(
        x, w, family=family, blocks=blocks, axis=axis, exchange=way
      ),
      x,
      w,
    )
    # A row of the identity has one product to sum: a weight, to the bit.
    whole = layers.straight_through_matmul(
      jnp.eye(40), w, family=family, blocks=blocks, axis=axis, exchange=way
    )
    return whole, y, *pullback(dy)

  rows, lies = rules.shardings(mesh, [('batch', None), AXES[axis]])
  with jax.set_mesh(mesh):
    whole, y, dx, dw = jax.jit(both, in_shardings=(rows, lies, rows))(
      x, w_KN, dy
    )
  codes, scale = quantize.quantizer(family)(jnp.asarray(w_KN), blocks, axis)
  np.testing.assert_array_equal(whole, quantize.dequantize(codes, scale, axis))
  paper = {'ternary': oracle.ternary, 'binary': oracle.binary}[family]
  _, effective, _ = paper(w_KN.T, blocks, axis)
  want = oracle.layer(x, effective, dy)
  for got, wanted in zip((y, dx, dw.T), want, strict=True):
    bound = 1e-5 * np.abs(wanted).max()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=bound)


@pytest.mark.parametrize('ring', [16, 4])
def test_a_float_layer_gathers_bfloat16_and_derives_as_without(
  ring, monkeypatch
):
  monkeypatch.setattr(gather, 'RING', ring)
  rng = np.random.default_rng(2)
  w_KN = rng.standard_normal((32, 16)).astype(np.float32)
  x, dy = (
    jnp.asarray(rng.standard_normal((16, n)), jnp.bfloat16) for n in w_KN.shape
  )
  mesh = mesh_lib.make_mesh(MeshConfig(fsdp=8))

  def both(x, w, dy):
    way = gather.exchange('bfloat16', AXES['out'])
    _, pullback = jax.vjp(lambda x, w: layers._float_matmul(x, w, way), x, w)
    return pullback(dy)

  placed = rules.shardings(mesh, [('batch', None), AXES['out']])
  with jax.set_mesh(mesh):
    program = (
      jax.jit(both, in_shardings=(*placed, placed[0]), out_shardings=(*placed,))
      .lower(x, w_KN, dy)
      .compile()
    )
    dx, dw = program(*jax.device_put((x, w_KN, dy), (*placed, placed[0])))
  found = collectives.of(program)
  assert {(one.op, one.results[0].dtype) for one in found} == {
    ('all-gather', 'u16'),
    ('reduce-scatter', 'f32'),
  }
  assert collectives.bytes_per_device(found) == {
    'all-gather': 2 * 32 * 16 * 7 // 8,
    'reduce-scatter': 4 * 32 * 16 * 7 // 8,
  }
  _, pullback = jax.vjp(lambda x, w: x @ w.astype(x.dtype), x, w_KN)
  for got, want in zip((dx, dw), pullback(dy), strict=True):
    assert got.dtype == want.dtype
    bound = 2.0**-8 * float(jnp.abs(want).max())
    np.testing.assert_allclose(
      np.asarray(got, np.float32), np.asarray(want, np.float32), atol=bound
    )


@pytest.mark.parametrize(
  'axes, config',
  [(AXES['out'], None), (AXES['in'], MeshConfig(data=4, fsdp=1, tensor=2))],
)
def test_a_matrix_that_is_whole_already_goes_no_way(axes, config):
  if config is None:
    assert gather.exchange('two_bit', axes) is None
    return
  with jax.set_mesh(mesh_lib.make_mesh(config)):
    assert gather.exchange('two_bit', axes) is None


def test_a_step_gathers_bytes_and_derives_the_same():
  """Parts of a batch, blocks computed again, tensor parallelism beside it."""
  parts, layers_, (fsdp, tensor) = 2, test_step.MODEL.layers, (4, 2)
  plain = test_step.with_run(accumulation=parts)
  config = test_step.with_run(
    accumulation=parts, remat='block', gather='two_bit'
  )
  params, tokens = step.init_state(plain).params, test_step.batch(0)

  def gradient(experiment):
    """Compiled in half the time; what is sent is the same."""
    run = lambda params, tokens: step._accumulated(experiment, params, tokens)
    options = {'xla_backend_optimization_level': 0}
    return jax.jit(run).lower(params, tokens).compile(options)

  (_, measured), want = gradient(plain)(params, tokens)
  mesh = mesh_lib.make_mesh(MeshConfig(fsdp=fsdp, tensor=tensor))
  with jax.set_mesh(mesh):
    params = jax.device_put(params, step.shardings(config, mesh).params)
    program = gradient(config)
    (_, told), got = program(params, tokens)
  assert float(told['loss']) == pytest.approx(float(measured['loss']), rel=1e-6)
  test_step.close(got, want, rtol=1e-5)

  # Each matrix once a part forwards and once backwards, at 4 codes a byte.
  weights = sum(
    spec.in_features * spec.out_features
    for spec in test_step.MODEL.linears.values()
  )
  packed = [
    one
    for one in collectives.of(program)
    if one.op == 'all-gather' and one.results[0].dtype == 'u8'
  ]
  assert sum(one.bytes * one.times for one in packed) == (
    2 * parts * layers_ * weights // 4 // tensor * (fsdp - 1) // fsdp
  )
  # No code or latent goes in another way: of the other arrays, none is as
  # large as a layer's smallest matrix in a loop.
  smallest = 32 * 32 // tensor
  others = [
    one
    for one in collectives.of(program)
    if one.op == 'all-gather' and one not in packed and one.times > parts
  ]
  assert all(shape.bytes < smallest for one in others for shape in one.results)


def test_what_a_float_model_cannot_gather_is_refused():
  def with_model(gather, dtype):
    model = dataclasses.replace(test_step.MODEL, family='float', dtype=dtype)
    return dataclasses.replace(test_step.with_run(gather=gather), model=model)

  with_model('bfloat16', 'bfloat16')
  with pytest.raises(ValueError, match=r"run.gather='two_bit' .* 'bfloat16'"):
    with_model('two_bit', 'bfloat16')
  with pytest.raises(ValueError, match="would round .*model.dtype='float32'"):
    with_model('bfloat16', 'float32')
