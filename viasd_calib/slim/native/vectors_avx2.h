// What vectors.h lists, of AVX2: two registers of eight lanes each.
#pragma once

namespace viasd {

struct Floats {
  __m256 low, high;
};

struct Ints {
  __m256i low, high;
};

using Mask = Ints;  // all bits of a lane, or none

inline Floats all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Ints all(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
inline Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline void store(float* to, Floats values) { _mm256_storeu_ps(to, values.low), _mm256_storeu_ps(to + 8, values.high); }
inline Ints bits_at(const void* from) { return {_mm256_loadu_si256((const __m256i*)from), _mm256_loadu_si256((const __m256i*)from + 1)}; }
inline void store(int32_t* to, Ints values) { _mm256_storeu_si256((__m256i*)to, values.low), _mm256_storeu_si256((__m256i*)to + 1, values.high); }
inline Floats floats_of(Ints bits) { return {_mm256_castsi256_ps(bits.low), _mm256_castsi256_ps(bits.high)}; }
inline Ints bits_of(Floats values) { return {_mm256_castps_si256(values.low), _mm256_castps_si256(values.high)}; }

#define VIASD_OF_HALVES(Type, name, operation) \
  inline Type name(Type a, Type b) { return {operation(a.low, b.low), operation(a.high, b.high)}; }
VIASD_OF_HALVES(Floats, operator+, _mm256_add_ps)
VIASD_OF_HALVES(Floats, operator-, _mm256_sub_ps)
VIASD_OF_HALVES(Floats, operator*, _mm256_mul_ps)
VIASD_OF_HALVES(Floats, operator/, _mm256_div_ps)
VIASD_OF_HALVES(Floats, larger, _mm256_max_ps)
VIASD_OF_HALVES(Floats, smaller, _mm256_min_ps)
VIASD_OF_HALVES(Ints, added, _mm256_add_epi32)
VIASD_OF_HALVES(Ints, larger, _mm256_max_epi32)
VIASD_OF_HALVES(Ints, equal, _mm256_cmpeq_epi32)
VIASD_OF_HALVES(Ints, either, _mm256_or_si256)
VIASD_OF_HALVES(Ints, both, _mm256_and_si256)
#undef VIASD_OF_HALVES

inline Floats fused(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)}; }
inline Floats fused_less(Floats a, Floats b, Floats c) { return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)}; }
inline Floats less_fused(Floats a, Floats b, Floats c) { return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)}; }

// sum + weights times inputs, in assembly as vectors_avx512.h says.
inline Floats with_products(Floats sum, Floats weights, Floats inputs) {
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum.low) : "x"(weights.low), "x"(inputs.low));
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum.high) : "x"(weights.high), "x"(inputs.high));
  return sum;
}

inline Floats whole_of(Floats values) { return {_mm256_round_ps(values.low, 8), _mm256_round_ps(values.high, 8)}; }
inline Floats floats_from(Ints values) { return {_mm256_cvtepi32_ps(values.low), _mm256_cvtepi32_ps(values.high)}; }

// Powers are whole numbers from -126 to 128; 2^128 is infinite.
inline Floats times_power(Floats values, Floats powers) {
  const auto power = [](__m256 n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23)); };
  return values * Floats{power(powers.low), power(powers.high)};
}

inline float sum_of(Floats values) {
  const __m256 eight = _mm256_add_ps(values.low, values.high);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

inline float largest_of(Floats values) {
  const __m256 eight = _mm256_max_ps(values.low, values.high);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

inline Ints sizes_of(Floats values) { return both(bits_of(values), all(int32_t(0x7FFFFFFF))); }

inline int32_t largest_of(Ints values) {
  alignas(32) int32_t own[16];
  store(own, values);
  return *std::max_element(own, own + 16);
}

inline Floats widen(const bfloat16* from) {
  const auto eight = [](const bfloat16* own) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)own)), 16));
  };
  return {eight(from), eight(from + 8)};
}

// Rounded to the nearest bfloat16, a tie to the even one.
inline __m256i narrowed(Floats values) {
  const auto rounded = [](__m256 own) {
    const __m256i bits = _mm256_castps_si256(own), last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7FFF))), 16);
    const __m256i no_number = _mm256_castps_si256(_mm256_cmp_ps(own, own, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7FC0), no_number);
  };
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded(values.low), rounded(values.high)), 0xD8);
}

inline void narrow(bfloat16* to, Floats values) { _mm256_storeu_si256((__m256i*)to, narrowed(values)); }

// Of 8 or 16 pairs of bfloat16 numbers, the first and the second of each.
inline __m256 firsts_of(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline __m256 seconds_of(__m256i pairs) { return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int32_t(0xFFFF0000)))); }

inline Ints counted() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)}; }

inline Mask first_lanes(int count) {
  const __m256i many = _mm256_set1_epi32(count);
  const Ints places = counted();
  return {_mm256_cmpgt_epi32(many, places.low), _mm256_cmpgt_epi32(many, places.high)};
}

template <int KIND>
inline Mask compared(Floats a, Floats b) { return bits_of({_mm256_cmp_ps(a.low, b.low, KIND), _mm256_cmp_ps(a.high, b.high, KIND)}); }

inline Mask not_numbers(Floats values) { return compared<_CMP_UNORD_Q>(values, values); }
inline Mask above(Floats a, Floats b) { return compared<_CMP_GT_OQ>(a, b); }
inline Mask equal(Floats a, Floats b) { return compared<_CMP_EQ_OQ>(a, b); }
inline bool any(Mask lanes) { return !_mm256_testz_si256(lanes.low, lanes.low) || !_mm256_testz_si256(lanes.high, lanes.high); }
// The second where the mask is set, else the first.
inline Ints choose(Mask lanes, Ints first, Ints second) {
  return {_mm256_blendv_epi8(first.low, second.low, lanes.low), _mm256_blendv_epi8(first.high, second.high, lanes.high)};
}
inline Floats choose(Mask lanes, Floats first, Floats second) { return floats_of(choose(lanes, bits_of(first), bits_of(second))); }

inline int least_of(Mask lanes, Ints values) {
  alignas(32) int32_t own[16];
  store(own, choose(lanes, all(INT32_MAX), values));
  return *std::min_element(own, own + 16);
}

// `count` numbers, at most 16, and zeros.
inline Floats load_first(int count, const float* from) {
  const Mask own = first_lanes(count);
  return {_mm256_maskload_ps(from, own.low), _mm256_maskload_ps(from + 8, own.high)};
}

inline void store_first(int count, float* to, Floats values) {
  const Mask own = first_lanes(count);
  _mm256_maskstore_ps(to, own.low, values.low), _mm256_maskstore_ps(to + 8, own.high, values.high);
}

inline void narrow_first(int count, bfloat16* to, Floats values) {
  alignas(32) bfloat16 own[16];
  narrow(own, values);
  std::memcpy(to, own, sizeof(bfloat16) * std::min(count, 16));
}

inline Floats widen_first(int count, const bfloat16* from) {
  alignas(32) bfloat16 own[16] = {};
  std::memcpy(own, from, sizeof(bfloat16) * std::min(count, 16));
  return widen(own);
}

}  // namespace viasd
