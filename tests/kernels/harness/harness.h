// SPDX-License-Identifier: Apache-2.0
#pragma once

// Whether every chunk of every phase ran once, and its writes were seen.
bool test_team(int scale);
