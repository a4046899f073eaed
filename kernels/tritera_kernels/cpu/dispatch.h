// SPDX-License-Identifier: Apache-2.0
// Which instruction set serves this process.
#pragma once

#include "kernel.h"

namespace tritera {

// The best that this processor and system can run, unless `select` or the
// environment variable TRITERA_CPU named another.
const Kernel& active_kernel();

// False if this machine cannot run `name`: nothing changes then.
bool select_kernel(const char* name);

}  // namespace tritera
