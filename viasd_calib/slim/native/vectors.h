// Sixteen numbers at once: in a register of AVX-512 with VNNI, or in two of AVX2 with FMA. Both give
//   Floats, Ints, Mask         16 float32, 16 int32, 16 lanes
//   all, load, store, bits_at  set, read, written; counted: 0 to 15
//   + - * / of Floats; fused (a b + c), fused_less (a b - c), less_fused (c - a b), with_products (sum + a b)
//   larger, smaller, whole_of (nearest integers), times_power (a 2^n), sum_of, largest_of; added: of Ints
//   sizes_of                   the bits of what is left without signs, which compare as these do, NaN above all
//   widen, narrowed, narrow, firsts_of, seconds_of    bfloat16
//   first_lanes, not_numbers, above, equal, either, both, any, choose, least_of; load_first, store_first, narrow_first,
//   widen_first
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

namespace viasd {

using bfloat16 = uint16_t;

constexpr int AHEAD = 4096;  // bytes of weights that are asked for before they are read: products of many rows hide reading

#define VIASD_ALL(index, count) _Pragma("GCC unroll 16") for (int index = 0; index < count; ++index)

}  // namespace viasd

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define VIASD_AVX512
#include "vectors_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "vectors_avx2.h"
#else
#error "the kernels need AVX-512 with VNNI, or AVX2 with FMA"
#endif

namespace viasd {

// A vector of the weight, and a request for one that comes later.
inline Ints read_ahead(const char* from, const char* later) {
  _mm_prefetch(later, _MM_HINT_T0);
  return bits_at(from);
}

// e^x, within 2 units in the last place from -87 to 88 (Cephes' polynomial); infinite above.
inline Floats exponential(Floats x) {
  x = smaller(larger(x, all(-87.0f)), all(89.0f));
  const Floats n = whole_of(x * all(1.44269504f));
  Floats r = less_fused(n, all(0.693359375f), x);
  r = less_fused(n, all(-2.12194440e-4f), r);
  Floats p = all(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = fused(p, r, all(c));
  p = fused(p * r, r, r + all(1.0f));
  return times_power(p, n);
}

}  // namespace viasd
