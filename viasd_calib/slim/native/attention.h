// Softmax attention of a few queries over cached keys and values in bfloat16: by vectors, or by AMX tiles where all query
// heads that share keys, of all tokens of a pass, are rows of one product. What a query gives does not depend on others.
#pragma once

#include "kernels.h"

namespace viasd {

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

// One query: scores has room for its slots; to [width].
inline void attend(const Head& head, const bfloat16* query, Span span, float* scores, float* to) {
  const int count = span.end - span.first;
  const bfloat16* keys = head.keys + size_t(span.first) * head.width;
  const bfloat16* values = head.values + size_t(span.first) * head.width;
  float top = -INFINITY;
  for (int s = 0; s < count; ++s) {
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < head.width; i += 32) {
      const __m512i some = _mm512_loadu_si512(query + i), other = _mm512_loadu_si512(keys + size_t(s) * head.width + i);
#ifdef __AVX512BF16__
      sum = _mm512_dpbf16_ps(sum, (__m512bh)some, (__m512bh)other);
#else
      sum = _mm512_fmadd_ps(firsts_of(some), firsts_of(other), sum);
      sum = _mm512_fmadd_ps(seconds_of(some), seconds_of(other), sum);
#endif
    }
    scores[s] = _mm512_reduce_add_ps(sum) * head.scaling;
    top = std::max(top, scores[s]);
  }
  __m512 total = _mm512_setzero_ps();
  for (int s = 0; s < count; s += 16) {
    const __mmask16 own = count - s < 16 ? __mmask16((1u << (count - s)) - 1) : __mmask16(0xFFFF);
    const __m512 share = _mm512_maskz_mov_ps(own, exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(own, scores + s), _mm512_set1_ps(top))));
    total = _mm512_add_ps(total, share);
    _mm512_mask_storeu_ps(scores + s, own, share);
  }
  const __m512 factor = _mm512_set1_ps(1 / _mm512_reduce_add_ps(total));
  for (int i = 0; i < head.width; i += 16) {
    __m512 mixed = _mm512_setzero_ps();
    for (int s = 0; s < count; ++s) mixed = _mm512_fmadd_ps(_mm512_set1_ps(scores[s]), widen(values + size_t(s) * head.width + i), mixed);
    _mm512_storeu_ps(to + i, _mm512_mul_ps(mixed, factor));
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
