// What vectors.h lists, of AVX-512.
#pragma once

namespace viasd {

using Floats = __m512;
using Ints = __m512i;
using Mask = __mmask16;

inline Floats all(float value) { return _mm512_set1_ps(value); }
inline Ints all(int32_t value) { return _mm512_set1_epi32(value); }
inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Floats values) { _mm512_storeu_ps(to, values); }
inline Ints bits_at(const void* from) { return _mm512_loadu_si512(from); }

inline Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats fused_less(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }
inline Floats less_fused(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats whole_of(Floats values) { return _mm512_roundscale_ps(values, 0); }
inline Floats times_power(Floats values, Floats powers) { return _mm512_scalef_ps(values, powers); }
inline float sum_of(Floats values) { return _mm512_reduce_add_ps(values); }
inline float largest_of(Floats values) { return _mm512_reduce_max_ps(values); }

inline Ints sizes_of(Floats values) { return _mm512_castps_si512(_mm512_abs_ps(values)); }
inline Ints larger(Ints a, Ints b) { return _mm512_max_epu32(a, b); }
inline int32_t largest_of(Ints values) { return int32_t(_mm512_reduce_max_epu32(values)); }

// sum + the products of weights, or of neighbouring ones, with inputs. In assembly, since GCC 12 copies the sums of
// the intrinsics to the stack and back.
inline Floats with_products(Floats sum, Floats weights, Floats inputs) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(inputs));
  return sum;
}

inline Ints with_products(Ints sum, Ints codes, Ints inputs) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(inputs));
  return sum;
}

#ifdef __AVX512BF16__
inline Floats with_products(Floats sum, Ints weights, Ints inputs) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(inputs));
  return sum;
}
#endif

inline Floats widen(const bfloat16* from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16));
}

// Rounded to the nearest bfloat16, a tie to the even one.
inline __m256i narrowed(Floats values) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(values);
#else
  const __m512i bits = _mm512_castps_si512(values), last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7FFF))), 16);
  const __mmask16 no_number = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, no_number, _mm512_set1_epi32(0x7FC0)));
#endif
}

inline void narrow(bfloat16* to, Floats values) { _mm256_storeu_si256((__m256i*)to, narrowed(values)); }

// Of 16 pairs of bfloat16 numbers, the first and the second of each.
inline Floats firsts_of(Ints pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline Floats seconds_of(Ints pairs) { return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xFFFF0000)))); }

inline Mask first_lanes(int count) { return count >= 16 ? Mask(0xFFFF) : Mask((1u << count) - 1); }
inline Mask not_numbers(Floats values) { return _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q); }
inline Mask above(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Mask equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Mask equal(Ints a, Ints b) { return _mm512_cmpeq_epi32_mask(a, b); }
inline Mask either(Mask a, Mask b) { return a | b; }
inline Mask both(Mask a, Mask b) { return a & b; }
inline bool any(Mask lanes) { return lanes != 0; }
// The second where the mask is set, else the first.
inline Floats choose(Mask lanes, Floats first, Floats second) { return _mm512_mask_blend_ps(lanes, first, second); }
inline Ints choose(Mask lanes, Ints first, Ints second) { return _mm512_mask_blend_epi32(lanes, first, second); }

inline Ints added(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints counted() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
inline int least_of(Mask lanes, Ints values) { return _mm512_mask_reduce_min_epi32(lanes, values); }

// `count` numbers, at most 16, and zeros.
inline Floats load_first(int count, const float* from) { return _mm512_maskz_loadu_ps(first_lanes(count), from); }
inline void store_first(int count, float* to, Floats values) { _mm512_mask_storeu_ps(to, first_lanes(count), values); }
inline void narrow_first(int count, bfloat16* to, Floats values) { _mm256_mask_storeu_epi16(to, first_lanes(count), narrowed(values)); }
inline Floats widen_first(int count, const bfloat16* from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(count), from)), 16));
}

}  // namespace viasd
