// SPDX-License-Identifier: Apache-2.0
// e^x and 2^x over the vectors of a simd_*.h, included before this.
#pragma once

namespace tritera {
namespace {

// e^r for |r| <= ln 2 / 2, as 1 + r + r^2 q(r); q is fitted for the least
// relative error in e^r: 3e-9.
inline F exponential_near_zero(F r) {
  F q = broadcast(0x1.6a23cep-10f);
  q = fma(q, r, broadcast(0x1.123a2p-7f));
  q = fma(q, r, broadcast(0x1.5558f2p-5f));
  q = fma(q, r, broadcast(0x1.555492p-3f));
  q = fma(q, r, broadcast(0x1.fffffcp-2f));
  return add(broadcast(1), fma(mul(r, r), q, r));
}

// e^x within 2 ulp; infinite and 0 (or the nearest denormal) past the ends,
// NaN where x is.
inline F exponential(F x) {
  x = max(broadcast(-104), min(broadcast(89), x));
  F n = round_even(mul(x, broadcast(1.44269504f)));
  // ln 2 in two parts: n times the first is exact.
  F r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  return scale_by_power(exponential_near_zero(r), n);
}

// 2^x for x <= 0, within 2 ulp; NaN where x is.
inline F power_of_two_at_most_one(F x) {
  x = max(broadcast(-150), x);
  F n = round_even(x);
  F r = mul(sub(x, n), broadcast(0.693147181f));
  return scale_by_power(exponential_near_zero(r), n);
}

}  // namespace
}  // namespace tritera
