# SPDX-License-Identifier: Apache-2.0
"""`python -m tritera_jax VERB ...` is `tritera VERB ...`."""

import sys

from tritera_jax import cli

if __name__ == '__main__':
  sys.exit(cli.main())
