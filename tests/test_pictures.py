# SPDX-License-Identifier: Apache-2.0
import struct
from xml.etree import ElementTree

import matplotlib
from matplotlib import colors
from matplotlib.figure import Figure
import numpy as np
import pytest

from tritera_jax import pictures


def drawn() -> Figure:
  figure = Figure(figsize=(3, 2))
  figure.subplots().set(xlabel='tokens', ylabel='loss (nats a token)')
  return figure


def test_a_picture_is_the_style_s_whatever_the_user_s_settings(tmp_path):
  with matplotlib.rc_context({'font.size': 30, 'svg.fonttype': 'path'}):
    matplotlib.get_backend()  # which only its first use settles
    before = matplotlib.rcParams.copy()
    with pictures.style():
      png, svg = pictures.save(drawn(), tmp_path / 'loss')
    assert matplotlib.rcParams == before
  # The PNG's header holds width and height: 3 x 2 inches at 200 dpi.
  assert struct.unpack('>II', png.read_bytes()[16:24]) == (600, 400)
  words = [
    ''.join(node.itertext())
    for node in ElementTree.parse(svg).iter('{http://www.w3.org/2000/svg}text')
  ]
  assert 'tokens' in words and 'loss (nats a token)' in words


def test_the_same_picture_has_the_same_bytes(tmp_path):
  def written(name):
    with pictures.style():
      return [p.read_bytes() for p in pictures.save(drawn(), tmp_path / name)]

  assert written('a') == written('b')


def test_colours_of_families_differ_for_who_sees_no_red_or_no_green():
  # Vienot, Brettel and Mollon (1999): what protanopes and deuteranopes see
  # of linear RGB. 0.1 apart in RGB is easily told apart.
  seen = {
    'protanope': [[0.112, 0.888, 0.0], [0.112, 0.888, 0.0], [0.004, -0.004, 1]],
    'deuteranope': [[0.292, 0.708, 0], [0.292, 0.708, 0], [-0.022, 0.022, 1]],
  }
  families = [colors.to_rgb(c) for c in pictures.COLOURS.values()]
  linear = np.array(families) ** 2.2
  for matrix in seen.values():
    rgb = np.clip(linear @ np.transpose(matrix), 0, 1) ** (1 / 2.2)
    for i in range(3):
      assert min(np.linalg.norm(rgb[i] - rgb[j]) for j in {0, 1, 2} - {i}) > 0.1


@pytest.mark.parametrize(
  ('number', 'text'),
  [(512, '512'), (99_740_000, '99.7M'), (999_900_000, '1B'), (3e11, '300B')],
)
def test_short_counts(number, text):
  assert pictures.short(number) == text
