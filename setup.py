# SPDX-License-Identifier: Apache-2.0
"""Two source roots, which setup.cfg's find: cannot say."""

from setuptools import find_packages, setup

setup(
  packages=find_packages(include=['tritera_jax*']) + find_packages('kernels')
)
