// Statistics of rows of logits (decoding/kernels/reference.py says what each is), a row as another.
#pragma once

#include "vectors.h"

namespace viasd {

// Of one row; all but the index are NaN where the row holds NaN or +inf.
struct Statistics {
  float maximum, log_sum_exp, entropy, second;
  int64_t argmax;
};

// 16 logits from `at` on, -inf after the last one.
inline Floats logits_at(const bfloat16* row, int at, int count) {
  if (at + 16 <= count) return widen(row + at);
  return choose(first_lanes(count - at), all(-INFINITY), widen_first(count - at, row + at));
}

inline float logit_at(const bfloat16* row, int64_t at) {
  const uint32_t bits = uint32_t(row[at]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The largest logit of a row, the first place of it, and the second largest, which is the same where that occurs twice.
struct Largest {
  float first, second;
  int64_t place;
  bool is_number;  // all are numbers; else the others say nothing, but that the place is one of the row
};

inline Largest largest_logit(const bfloat16* row, int count) {
  const Floats lowest = all(-INFINITY);
  Floats first = lowest, second = lowest;
  Ints places = all(0), place = counted();
  Mask no_numbers = first_lanes(0);
  for (int i = 0; i < count; i += 16) {
    const Floats values = logits_at(row, i, count);
    no_numbers = either(no_numbers, not_numbers(values));
    const Mask more = above(values, first);
    second = larger(second, smaller(first, values));
    first = choose(more, first, values);
    places = choose(more, places, place);
    place = added(place, all(16));
  }
  const float maximum = largest_of(first);
  if (maximum == -INFINITY) return {maximum, maximum, 0, !any(no_numbers)};
  const Mask holders = equal(first, all(maximum));
  const int argmax = least_of(holders, places);
  // Twice the largest: in two lanes, or in one, where the second of the lane holds it.
  const Mask owner = both(holders, equal(places, all(argmax)));
  return {maximum, largest_of(choose(owner, first, second)), argmax, !any(no_numbers)};
}

inline Statistics statistics_of(const bfloat16* row, int count) {
  const Largest top = largest_logit(row, count);
  const float maximum = top.first;
  if (!top.is_number || maximum == INFINITY) return {NAN, NAN, NAN, NAN, top.place};
  if (maximum == -INFINITY) return {maximum, maximum, NAN, maximum, top.place};
  Floats total = all(0.0f), weighted = all(0.0f);
  const Floats anchor = all(maximum), faintest = all(-80.0f);  // e^-80 of a million is 0 in float32
  for (int i = 0; i < count; i += 16) {
    const Floats shifted = larger(logits_at(row, i, count) - anchor, faintest);
    const Floats weights = exponential(shifted);
    total = total + weights;
    weighted = fused(shifted, weights, weighted);
  }
  const float sum = sum_of(total), log_sum = std::log(sum);
  return {maximum, maximum + log_sum, log_sum - sum_of(weighted) / sum, top.second, top.place};
}

}  // namespace viasd
