// Statistics of rows of logits (decoding/kernels/reference.py says what each is), a row as another.
#pragma once

#include "kernels.h"

namespace viasd {

// Of one row; all but the index are NaN where the row holds NaN or +inf.
struct Statistics {
  float maximum, log_sum_exp, entropy, second;
  int64_t argmax;
};

// 16 logits from `at` on, -inf after the last one.
inline __m512 logits_at(const bfloat16* row, int at, int count) {
  if (at + 16 <= count) return widen(row + at);
  const __mmask16 inside = __mmask16((1u << (count - at)) - 1);
  const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, row + at)), 16);
  return _mm512_mask_blend_ps(inside, _mm512_set1_ps(-INFINITY), _mm512_castsi512_ps(bits));
}

// The largest logit of a row, the first place of it, and the second largest, which is the same where that occurs twice.
struct Largest {
  float first, second;
  int64_t place;
  bool is_number;  // all are numbers; else the others say nothing, but that the place is one of the row
};

inline Largest largest_of(const bfloat16* row, int count) {
  const __m512 lowest = _mm512_set1_ps(-INFINITY);
  __m512 first = lowest, second = lowest;
  __m512i places = _mm512_setzero_si512(), place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __mmask16 not_numbers = 0;
  for (int i = 0; i < count; i += 16) {
    const __m512 values = logits_at(row, i, count);
    not_numbers |= _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    const __mmask16 more = _mm512_cmp_ps_mask(values, first, _CMP_GT_OQ);
    second = _mm512_max_ps(second, _mm512_min_ps(first, values));
    first = _mm512_mask_blend_ps(more, first, values);
    places = _mm512_mask_blend_epi32(more, places, place);
    place = _mm512_add_epi32(place, _mm512_set1_epi32(16));
  }
  const float maximum = _mm512_reduce_max_ps(first);
  if (maximum == -INFINITY) return {maximum, maximum, 0, !not_numbers};
  const __mmask16 holders = _mm512_cmp_ps_mask(first, _mm512_set1_ps(maximum), _CMP_EQ_OQ);
  const int argmax = _mm512_mask_reduce_min_epi32(holders, places);
  // Twice the largest: in two lanes, or in one, where the second of the lane holds it.
  const __mmask16 owner = _mm512_mask_cmpeq_epi32_mask(holders, places, _mm512_set1_epi32(argmax));
  return {maximum, _mm512_reduce_max_ps(_mm512_mask_blend_ps(owner, first, second)), argmax, !not_numbers};
}

inline Statistics statistics_of(const bfloat16* row, int count) {
  const Largest top = largest_of(row, count);
  const float maximum = top.first;
  if (!top.is_number || maximum == INFINITY) return {NAN, NAN, NAN, NAN, top.place};
  if (maximum == -INFINITY) return {maximum, maximum, NAN, maximum, top.place};
  __m512 total = _mm512_setzero_ps(), weighted = _mm512_setzero_ps();
  const __m512 anchor = _mm512_set1_ps(maximum), faintest = _mm512_set1_ps(-80);  // e^-80 of a million is 0 in float32
  for (int i = 0; i < count; i += 16) {
    const __m512 shifted = _mm512_max_ps(_mm512_sub_ps(logits_at(row, i, count), anchor), faintest);
    const __m512 weights = exponential(shifted);
    total = _mm512_add_ps(total, weights);
    weighted = _mm512_fmadd_ps(shifted, weights, weighted);
  }
  const float sum = _mm512_reduce_add_ps(total), log_sum = std::log(sum);
  return {maximum, maximum + log_sum, log_sum - _mm512_reduce_add_ps(weighted) / sum, top.second, top.place};
}

}  // namespace viasd
