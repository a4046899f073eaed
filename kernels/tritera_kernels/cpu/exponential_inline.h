// SPDX-License-Identifier: Apache-2.0
// e^x over the vectors of a simd_*.h, included before this.
#pragma once

namespace tritera {
namespace {

// Within 2 ulp; infinite and 0 (or the nearest denormal) past the ends, NaN
// where x is.
inline F exponential(F x) {
  x = max(broadcast(-104), min(broadcast(89), x));
  F n = round_even(mul(x, broadcast(1.44269504f)));
  // ln 2 in two parts: n times the first is exact.
  F r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  // (e^r - 1 - r) / r^2 for |r| <= ln 2 / 2, fitted for the least relative
  // error in e^r: 3e-9.
  F q = broadcast(0x1.6a23cep-10f);
  q = fma(q, r, broadcast(0x1.123a2p-7f));
  q = fma(q, r, broadcast(0x1.5558f2p-5f));
  q = fma(q, r, broadcast(0x1.555492p-3f));
  q = fma(q, r, broadcast(0x1.fffffcp-2f));
  F p = add(broadcast(1), fma(mul(r, r), q, r));
  return scale_by_power(p, n);
}

}  // namespace
}  // namespace tritera
