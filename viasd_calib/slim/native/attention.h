// Softmax attention of a few queries over cached keys and values in bfloat16: by vectors, for at most four queries of heads
// that share keys, or by AMX tiles, for sixteen. What a query gives does not depend on others.
#pragma once

#include "products.h"

namespace viasd {

constexpr int MOST_WIDTH = 512;  // of a head

// One head's keys and values, [slots][width] each, of which `capacity` may be read.
struct Head {
  const bfloat16* keys;
  const bfloat16* values;
  int width;
  int capacity;
  float scaling;
};

// The slots that a query at a position reads.
struct Span {
  int first, end;
};

inline Span span_of(int position, int window) { return {window && position >= window ? position + 1 - window : 0, position + 1}; }

constexpr int SOME_QUERIES = 4;
constexpr int SOME_SLOTS = 4;

// Bytes that attend works in, for queries whose last one reads up to slot `end`.
inline size_t vector_attention_bytes(int end) { return size_t(SOME_QUERIES) * (end + SOME_SLOTS) * 4; }

// Products of COUNT queries with the keys of four slots: found[i][slot]. Each is summed in the same order, whatever its
// place.
#ifdef VIASD_AVX512
constexpr int MIXED_AT_ONCE = 4;  // vectors of a value whose sums registers hold, beside four queries

// The sums of 16 vectors, one a lane.
inline Floats sums_of(Floats (&vectors)[16]) {
  for (int i = 0; i < 8; ++i)
    vectors[i] = _mm512_add_ps(_mm512_unpacklo_ps(vectors[2 * i], vectors[2 * i + 1]), _mm512_unpackhi_ps(vectors[2 * i], vectors[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    const __m512d one = (__m512d)vectors[2 * i], two = (__m512d)vectors[2 * i + 1];
    vectors[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(one, two), (__m512)_mm512_unpackhi_pd(one, two));
  }
  const auto halved = [](__m512 one, __m512 two) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(one, two, 0x88), _mm512_shuffle_f32x4(one, two, 0xDD));
  };
  return halved(halved(vectors[0], vectors[1]), halved(vectors[2], vectors[3]));
}

template <int COUNT>
inline void key_products(const bfloat16* const (&keys)[SOME_SLOTS], const bfloat16 (*queries)[MOST_WIDTH], int width, float (*found)[SOME_SLOTS]) {
  Floats sums[SOME_QUERIES * SOME_SLOTS];
  VIASD_ALL(i, SOME_QUERIES * SOME_SLOTS) sums[i] = all(0.0f);
  for (int j = 0; j < width; j += 32) {
    Ints some[SOME_SLOTS];
    VIASD_ALL(k, SOME_SLOTS) some[k] = bits_at(keys[k] + j);
    VIASD_ALL(i, COUNT) {
      const Ints query = bits_at(queries[i] + j);
#ifdef __AVX512BF16__
      VIASD_ALL(k, SOME_SLOTS) sums[i * SOME_SLOTS + k] = with_products(sums[i * SOME_SLOTS + k], some[k], query);
#else
      VIASD_ALL(k, SOME_SLOTS) sums[i * SOME_SLOTS + k] = with_products(sums[i * SOME_SLOTS + k], firsts_of(some[k]), firsts_of(query));
      VIASD_ALL(k, SOME_SLOTS) sums[i * SOME_SLOTS + k] = with_products(sums[i * SOME_SLOTS + k], seconds_of(some[k]), seconds_of(query));
#endif
    }
  }
  alignas(64) float lanes[16];
  store(lanes, sums_of(sums));
  std::memcpy(found, lanes, sizeof(float) * COUNT * SOME_SLOTS);
}
#else
constexpr int MIXED_AT_ONCE = 1;

// The sums of four vectors of eight, one a lane.
inline __m128 sums_of(const __m256 (&vectors)[SOME_SLOTS]) {
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(vectors[0], vectors[1]), _mm256_hadd_ps(vectors[2], vectors[3]));
  return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}

template <int COUNT>
inline void key_products(const bfloat16* const (&keys)[SOME_SLOTS], const bfloat16 (*queries)[MOST_WIDTH], int width, float (*found)[SOME_SLOTS]) {
  for (int i = 0; i < COUNT; ++i) {
    __m256 sums[SOME_SLOTS];
    VIASD_ALL(k, SOME_SLOTS) sums[k] = _mm256_setzero_ps();
    for (int j = 0; j < width; j += 16) {
      const __m256i query = _mm256_loadu_si256((const __m256i*)(queries[i] + j));
      VIASD_ALL(k, SOME_SLOTS) {
        const __m256i some = _mm256_loadu_si256((const __m256i*)(keys[k] + j));
        sums[k] = _mm256_fmadd_ps(firsts_of(some), firsts_of(query), sums[k]);
        sums[k] = _mm256_fmadd_ps(seconds_of(some), seconds_of(query), sums[k]);
      }
    }
    _mm_storeu_ps(found[i], sums_of(sums));
  }
}
#endif

// Scores of COUNT queries with the slots from `begin` to `end`: scores[i][slot - begin], and up to three more.
template <int COUNT>
inline void scores_of(const Head& head, const bfloat16 (*queries)[MOST_WIDTH], int begin, int end, float* const* scores) {
  for (int s = begin; s < end; s += SOME_SLOTS) {
    const bfloat16* keys[SOME_SLOTS];
    VIASD_ALL(k, SOME_SLOTS) keys[k] = head.keys + size_t(std::min(s + k, end - 1)) * head.width;
    float found[COUNT][SOME_SLOTS];
    key_products<COUNT>(keys, queries, head.width, found);
    VIASD_ALL(i, COUNT) _mm_storeu_ps(scores[i] + s - begin, _mm_mul_ps(_mm_loadu_ps(found[i]), _mm_set1_ps(head.scaling)));
  }
}

// Scores of a span become shares, but for the factor that is returned.
inline float shares_of(float* scores, int count) {
  float top = -INFINITY;
  for (int s = 0; s < count; ++s) top = std::max(top, scores[s]);
  Floats total = all(0.0f);
  for (int s = 0; s < count; s += 16) {
    const int own = std::min(16, count - s);
    const Floats share = choose(first_lanes(own), all(0.0f), exponential(load_first(own, scores + s) - all(top)));
    total = total + share;
    store_first(own, scores + s, share);
  }
  return 1 / sum_of(total);
}

// Values of the slots from `begin` to `end`, VECTORS times 16 of their numbers from `j` on, mixed by shares[i][slot - begin].
template <int COUNT, int VECTORS>
inline void mix(const Head& head, int begin, int end, int j, const float* const* shares, const float* factors, float* const* to) {
  Floats mixed[COUNT][VECTORS];
  VIASD_ALL(i, COUNT) VIASD_ALL(v, VECTORS) mixed[i][v] = all(0.0f);
  for (int s = begin; s < end; ++s) {
    Floats values[VECTORS];
    VIASD_ALL(v, VECTORS) values[v] = widen(head.values + size_t(s) * head.width + j + v * 16);
    VIASD_ALL(i, COUNT) {
      const Floats share = all(shares[i][s - begin]);
      VIASD_ALL(v, VECTORS) mixed[i][v] = with_products(mixed[i][v], values[v], share);
    }
  }
  VIASD_ALL(i, COUNT) VIASD_ALL(v, VECTORS) store(to[i] + j + v * 16, mixed[i][v] * all(factors[i]));
}

// COUNT queries of heads that share keys: queries[i] and to[i] are [width], float32.
template <int COUNT>
inline void attend_some(const Head& head, const float* const* queries, const Span* spans, float* memory, float* const* to) {
  bfloat16 rounded[COUNT][MOST_WIDTH];
  int begin = spans[0].first, end = 0;
  for (int i = 0; i < COUNT; ++i) {
    for (int j = 0; j < head.width; j += 16) narrow(rounded[i] + j, load(queries[i] + j));
    begin = std::min(begin, spans[i].first), end = std::max(end, spans[i].end);
  }
  float* scores[COUNT];
  float factors[COUNT];
  for (int i = 0; i < COUNT; ++i) scores[i] = memory + size_t(i) * (end - begin + SOME_SLOTS);
  scores_of<COUNT>(head, rounded, begin, end, scores);
  for (int i = 0; i < COUNT; ++i) {  // a slot that one query does not read has no share in it
    std::fill(scores[i], scores[i] + spans[i].first - begin, 0.0f);
    std::fill(scores[i] + spans[i].end - begin, scores[i] + end - begin, 0.0f);
    factors[i] = shares_of(scores[i] + spans[i].first - begin, spans[i].end - spans[i].first);
  }
  int j = 0;
  for (; j + 16 * MIXED_AT_ONCE <= head.width; j += 16 * MIXED_AT_ONCE) mix<COUNT, MIXED_AT_ONCE>(head, begin, end, j, scores, factors, to);
  for (; j < head.width; j += 16) mix<COUNT, 1>(head, begin, end, j, scores, factors, to);
}

// How many of `queries` queries a thread takes at once: four, or less where some threads would have none.
inline int queries_at_once(int queries, int shared_heads, int threads) {
  return std::clamp(queries * shared_heads / (2 * threads), 1, SOME_QUERIES);
}

// At most four queries.
inline void attend(const Head& head, int count, const float* const* queries, const Span* spans, float* memory, float* const* to) {
  switch (count) {
    case 4: return attend_some<4>(head, queries, spans, memory, to);
    case 3: return attend_some<3>(head, queries, spans, memory, to);
    case 2: return attend_some<2>(head, queries, spans, memory, to);
    default: return attend_some<1>(head, queries, spans, memory, to);
  }
}

#ifdef __AMX_INT8__
// rows[i] becomes column i.
inline void transpose(__m512 (&rows)[16]) {
  __m512 half[16];
  for (int i = 0; i < 16; i += 2) {
    half[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    half[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(half[i]), _mm512_castps_pd(half[i + 2])));
    rows[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(half[i]), _mm512_castps_pd(half[i + 2])));
    rows[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(half[i + 1]), _mm512_castps_pd(half[i + 3])));
    rows[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(half[i + 1]), _mm512_castps_pd(half[i + 3])));
  }
  for (int i = 0; i < 4; ++i) {
    half[i] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0x88);
    half[i + 4] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0xDD);
    half[i + 8] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0x88);
    half[i + 12] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0xDD);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_f32x4(half[i], half[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_f32x4(half[i], half[i + 8], 0xDD);
    rows[i + 4] = _mm512_shuffle_f32x4(half[i + 4], half[i + 12], 0x88);
    rows[i + 12] = _mm512_shuffle_f32x4(half[i + 4], half[i + 12], 0xDD);
  }
}

constexpr int BLOCK = 32;  // slots that a tile of shares has, beginning at multiples of it

// Bytes that attend_tiles works in, for queries whose last one reads up to slot `end`.
inline size_t attention_bytes(int width, int end) { return size_t(end + 2 * BLOCK) * ROWS * 6 + size_t(width) * ROWS * 2 + 4096; }

// At most 16 queries of heads that share keys: queries[i] and to[i] are [width], float32; memory is aligned to 64.
inline void attend_tiles(const Head& head, int count, const float* const* queries, const Span* spans, char* memory, float* const* to) {
  const int width = head.width;
  int begin = spans[0].first, end = 0;
  alignas(64) int firsts[ROWS] = {}, ends[ROWS] = {};
  for (int i = 0; i < count; ++i) {
    begin = std::min(begin, spans[i].first), end = std::max(end, spans[i].end);
    firsts[i] = spans[i].first, ends[i] = spans[i].end;
  }
  begin = begin / BLOCK * BLOCK;
  const int slots = (end - begin + BLOCK - 1) / BLOCK * BLOCK;
  float* scores = (float*)memory;                               // [slots][16 queries]
  bfloat16* shares = (bfloat16*)(scores + size_t(slots) * ROWS);  // [16 queries][slots]
  bfloat16* pairs = shares + size_t(slots) * ROWS;               // [width / 32][16][16 queries][2]
  bfloat16* some = pairs + size_t(width) * ROWS;                 // a tile of values, or of the last keys
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < width; j += 16) {
      alignas(32) bfloat16 rounded[16] = {};
      if (i < count) narrow(rounded, _mm512_loadu_ps(queries[i] + j));
      for (int k = 0; k < 16; ++k) pairs[(size_t(j + k) / 2) * ROWS * 2 + i * 2 + k % 2] = rounded[k];
    }
  shape_tiles(count);
  for (int s = 0; s < slots; s += 16) {
    _tile_zero(5);
    for (int j = 0; j < width; j += 32) {
      const bfloat16* keys = head.keys + size_t(begin + s) * width + j;
      int stride = width * 2;
      if (begin + s + 16 > head.capacity) {
        for (int k = 0; k < 16; ++k) {
          const bool there = begin + s + k < head.capacity;
          _mm512_storeu_si512(some + k * 32, there ? _mm512_loadu_si512(keys + size_t(k) * width) : _mm512_setzero_si512());
        }
        keys = some, stride = 64;
      }
      _tile_loadd(6, keys, stride);
      _tile_loadd(7, pairs + size_t(j) / 2 * ROWS * 2, 64);
      _tile_dpbf16ps(5, 6, 7);
    }
    _tile_stored(5, scores + size_t(s) * ROWS, 64);
  }
  const __m512i first = _mm512_load_si512(firsts), last = _mm512_load_si512(ends);
  const auto seen = [&](int s) {
    const __m512i slot = _mm512_set1_epi32(begin + s);
    return _mm512_cmple_epi32_mask(first, slot) & _mm512_cmplt_epi32_mask(slot, last);
  };
  const __m512 scaling = _mm512_set1_ps(head.scaling);
  __m512 top = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
  for (int s = 0; s < slots; ++s)
    top = _mm512_mask_max_ps(top, seen(s), top, _mm512_mul_ps(_mm512_loadu_ps(scores + size_t(s) * ROWS), scaling));
  for (int s = 0; s < slots; s += 16) {
    __m512 block[16];
    for (int k = 0; k < 16; ++k) {
      const __m512 score = _mm512_mul_ps(_mm512_loadu_ps(scores + size_t(s + k) * ROWS), scaling);
      block[k] = _mm512_maskz_mov_ps(seen(s + k), exponential(_mm512_sub_ps(score, top)));
      total = _mm512_add_ps(total, block[k]);
    }
    transpose(block);
    for (int i = 0; i < count; ++i) narrow(shares + size_t(i) * slots + s, block[i]);
  }
  alignas(64) float totals[ROWS];
  _mm512_store_ps(totals, total);
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  alignas(64) float mixed[ROWS][TILE];
  for (int j = 0; j < width; j += TILE) {
    _tile_zero(0);
    for (int s = 0; s < slots; s += BLOCK) {
      for (int k = 0; k < BLOCK; k += 2) {
        const auto row = [&](int slot) {
          return slot < head.capacity ? _mm256_loadu_si256((const __m256i*)(head.values + size_t(slot) * width + j)) : _mm256_setzero_si256();
        };
        const __m512i two = _mm512_inserti64x4(_mm512_castsi256_si512(row(begin + s + k)), row(begin + s + k + 1), 1);
        _mm512_storeu_si512(some + k * 16, _mm512_permutexvar_epi16(interleave, two));
      }
      _tile_loadd(4, shares + s, slots * 2);
      _tile_loadd(5, some, 64);
      _tile_dpbf16ps(0, 4, 5);
    }
    _tile_stored(0, mixed, 64);
    for (int i = 0; i < count; ++i) _mm512_storeu_ps(to[i] + j, _mm512_mul_ps(_mm512_load_ps(mixed[i]), _mm512_set1_ps(1 / totals[i])));
  }
}
#endif

}  // namespace viasd
