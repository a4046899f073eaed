# SPDX-License-Identifier: Apache-2.0
"""Two source roots, which setup.cfg's find: cannot say, and the C++ kernels.

The kernels are a plain shared library: no Python in it, loaded by ctypes. Its
files for one instruction set carry that in their names and get its flags; the
library chooses among them at run time, so a wheel runs on any processor of
its architecture. Without a compiler the installation succeeds without it.
"""

from concurrent.futures import ThreadPoolExecutor
import os
from pathlib import Path
import platform

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

SOURCES = Path('kernels/tritera_kernels/cpu')
AVX512 = '-mavx2 -mfma -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni'
# By the parts of a file's name; the last that occurs counts.
FLAGS = {
  'x86_64': {
    'avx2': '-mavx2 -mfma -mf16c',
    'avx512': AVX512,
    'vbmi': f'{AVX512} -mavx512vbmi',
    'amx': f'{AVX512} -mavx512vbmi -mamx-tile -mamx-int8',
  },
  'aarch64': {
    'neon': '-march=armv8.2-a+dotprod',
    'i8mm': '-march=armv8.2-a+dotprod+i8mm',
  },
}
# Products are rounded before they are added, as the reference does.
COMMON = (
  '-std=c++17 -O3 -g0 -ffp-contract=off -fno-math-errno -fvisibility=hidden '
  # gcc 12 believes its own intrinsics uninitialised.
  '-Wall -Wno-maybe-uninitialized -Wno-uninitialized'
)


class BuildKernels(build_ext):
  """Compiles each file with its own flags."""

  def get_ext_filename(self, fullname):
    return os.path.join(*fullname.split('.')) + '.so'  # whichever Python's

  def build_extension(self, ext):
    target = self.get_ext_fullpath(ext.name)
    inputs = [*ext.sources, *ext.depends, __file__]
    if not (self.force or newer_group(inputs, target)):
      return  # as it is after an installation with fewer extras
    import jaxlib  # a build requirement, for its headers

    flags = FLAGS.get(platform.machine().replace('arm64', 'aarch64'), {})
    headers = str(Path(jaxlib.__file__).parent / 'include')

    def compile(source: str) -> list[str]:
      own = [f for part, f in flags.items() if part in Path(source).stem]
      return self.compiler.compile(
        [source],
        output_dir=self.build_temp,
        include_dirs=[str(SOURCES)],
        extra_postargs=[
          *COMMON.split(),
          *(own[-1].split() if own else ()),
          '-isystem',
          headers,
        ],
      )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
      objects = [o for own in pool.map(compile, ext.sources) for o in own]
    self.compiler.link_shared_object(
      objects, target, extra_postargs=['-pthread'], target_lang='c++'
    )


class AnyPython(bdist_wheel):
  """Names the wheel for its platform and for no version of Python."""

  def get_tag(self):
    return 'py3', 'none', super().get_tag()[2]


setup(
  packages=find_packages(include=['tritera_jax*']) + find_packages('kernels'),
  cmdclass={'build_ext': BuildKernels, 'bdist_wheel': AnyPython},
  ext_modules=[
    Extension(
      'tritera_kernels.cpu.libtritera',
      sorted(str(path) for path in SOURCES.glob('*.cc')),
      depends=sorted(str(path) for path in SOURCES.glob('*.h')),
      language='c++',
      optional=True,
    )
  ],
)
