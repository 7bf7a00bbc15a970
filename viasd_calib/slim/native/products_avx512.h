// Products of few rows with packed weights by AVX-512 and VNNI, and by BF16 and AMX where they are there. Inputs beside a
// weight in 8 or 4 bits have 8: one of 16 bits is two rows, its coarse steps and what they leave in fine ones.
#pragma once

#include "linear.h"

namespace viasd {

// Rows of a token.
inline int planes_of(const Linear& linear) { return linear.format != BFLOAT16 && linear.input_bits == 16 ? 2 : 1; }

// Of an input.
inline int bytes_of(const Linear& linear) { return linear.format == BFLOAT16 ? sizeof(Number) : 1; }

// 16 numbers as codes of 8 bits.
inline void put_codes(char* to, __m512i codes) { _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(codes)); }

// Zeros after `count` codes of a row, and their sums.
inline void finish_codes(const Linear& linear, char* data, int count, int row, const Inputs& to) {
  std::memset(data + count, 0, linear.inputs - count);
  const int groups = linear.inputs / GROUP;
  __m512i sum = _mm512_setzero_si512();
  for (int group = 0; group < groups; ++group) {
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(data + group * GROUP));
    if (linear.format == INT8) continue;
    to.sums[row * groups + group] = _mm512_reduce_add_epi32(sum);
    sum = _mm512_setzero_si512();
  }
  if (linear.format == INT8) to.sums[row] = _mm512_reduce_add_epi32(sum);
}

// The `count` numbers of a token as `linear` reads them; count is a multiple of 16.
inline void put_token(const Linear& linear, const float* token, int count, int number, const Inputs& to) {
  const int planes = planes_of(linear), row = number * planes;
  char* data = to.data + size_t(row) * linear.inputs * bytes_of(linear);
  if (linear.format == BFLOAT16) {
    put_row(linear, token, count, (Number*)data);
    return;
  }
  const float step = step_of(token, count), fine = step / FINE;
  const __m512 coarse_step = _mm512_set1_ps(step), steps = _mm512_set1_ps(1 / step), fine_steps = _mm512_set1_ps(1 / fine);
  char* rest = data + linear.inputs;
  to.steps[row] = step;
  for (int i = 0; i < count; i += 16) {
    const __m512 values = load(token + i);
    const __m512i codes = _mm512_cvtps_epi32(_mm512_mul_ps(values, steps));
    put_codes(data + i, codes);
    if (planes == 1) continue;
    const __m512 left = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(codes), coarse_step, values);
    put_codes(rest + i, _mm512_cvtps_epi32(_mm512_mul_ps(left, fine_steps)));
  }
  finish_codes(linear, data, count, row, to);
  if (planes == 1) return;
  to.steps[row + 1] = fine;
  finish_codes(linear, rest, count, row + 1, to);
}

// The codes of eight inputs of 16 outputs: those of the first four, and of the others.
inline void unpack(__m512i both, __m512i& first, __m512i& second) {
  const __m512i low = _mm512_set1_epi8(15);
  first = _mm512_and_si512(both, low);
  second = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
}

// What sums of int8 products stand for, but for the step of the row; 128 is in each code of a weight.
inline __m512 scaled(__m512i sum, const Linear& linear, int tile, int32_t inputs_sum) {
  const __m512i whole = _mm512_sub_epi32(sum, _mm512_set1_epi32(128 * inputs_sum));
  return _mm512_mul_ps(_mm512_cvtepi32_ps(whole), _mm512_loadu_ps(linear.steps + size_t(tile) * TILE));
}

// The same of one group of int4 products, added to a total.
inline __m512 with_group(__m512 total, __m512i sum, const Linear& linear, size_t at, int32_t inputs_sum) {
  total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_loadu_ps(linear.steps + at), total);
  return _mm512_fmadd_ps(_mm512_set1_ps(float(inputs_sum)), _mm512_loadu_ps(linear.lowest + at), total);
}

#ifdef __AMX_INT8__
constexpr bool AMX = true;

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

inline thread_local int shaped = 0;

inline void shape_tiles(int rows) {
  if (shaped == rows) return;
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) {
    shapes.bytes[tile] = 64;
    shapes.rows[tile] = tile < 5 ? rows : TILE;  // 0 to 3 sums, 4 inputs, 5 to 7 weights
  }
  _tile_loadconfig(&shapes);
  shaped = rows;
}

// Before the first product of a call, and after the last: other libraries of the process shape tiles too.
inline void forget_tiles() {
  if (shaped) _tile_release();
  shaped = 0;
}

// The sum of COUNT tiles of outputs over a depth of inputs, for at most 16 rows.
template <int COUNT, bool WHOLE>
inline void tile_product(const char* const* weight, int blocks, const char* rows, int stride, int32_t (*sums)[ROWS][TILE]) {
#define VIASD_MULTIPLY(number, tile) \
  if (COUNT > number) { \
    _tile_loadd(tile, weight[number % COUNT] + size_t(block) * 1024, 64); \
    if (WHOLE) _tile_dpbsud(number, 4, tile); else _tile_dpbf16ps(number, 4, tile); \
  }
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  for (int block = 0; block < blocks; ++block) {
    _tile_loadd(4, rows + block * 64, stride);
    VIASD_MULTIPLY(0, 5) VIASD_MULTIPLY(1, 6) VIASD_MULTIPLY(2, 7) VIASD_MULTIPLY(3, 5)
  }
#undef VIASD_MULTIPLY
  _tile_stored(0, sums[0], 64);
  if (COUNT > 1) _tile_stored(1, sums[1 % COUNT], 64);
  if (COUNT > 2) _tile_stored(2, sums[2 % COUNT], 64);
  if (COUNT > 3) _tile_stored(3, sums[3 % COUNT], 64);
}
#else
constexpr bool AMX = false;

inline void forget_tiles() {}
#endif

// Values of TILES tiles of outputs for COUNT rows, without bias: to[row][tile]. Each vector of the weight is read once,
// and multiplied by all rows.
template <int COUNT, int TILES>
inline void vector_product(const Linear& linear, const Reading& reading, const Inputs& inputs, int first, Floats (*to)[CHUNK]) {
  const int depth = linear.inputs, groups = depth / GROUP;
  const size_t stride = size_t(depth) * bytes_of(linear), bytes = tile_bytes(linear), group_bytes = bytes / groups;
  const char* rows = inputs.data + first * stride;
  const char *weight[TILES], *ask[TILES];  // of a group of inputs: where it lies, and what is asked for meanwhile
  const auto enter = [&](int group) {
    VIASD_ALL(t, TILES) weight[t] = reading.from[t] + group * group_bytes, ask[t] = later(reading, t, TILES, group * group_bytes, bytes);
  };
  const auto broadcast = [&](int row, size_t byte) {
    int32_t few;
    std::memcpy(&few, rows + row * stride + byte, 4);
    return _mm512_set1_epi32(few);
  };
  if (linear.format == BFLOAT16) {
    __m512 sums[COUNT][TILES];
    VIASD_ALL(r, COUNT) VIASD_ALL(t, TILES) sums[r][t] = _mm512_setzero_ps();
    for (int g = 0; g < groups; ++g) {
      enter(g);
      for (size_t k = 0; k < GROUP / 2; ++k) {
        const size_t pair = size_t(g) * GROUP / 2 + k;
#ifdef __AVX512BF16__
        __m512i pairs[TILES];
        VIASD_ALL(t, TILES) pairs[t] = read_ahead(weight[t] + k * 64, ask[t] + k * 64);
        VIASD_ALL(r, COUNT) {
          const __m512i few = broadcast(r, pair * 4);
          VIASD_ALL(t, TILES) sums[r][t] = with_products(sums[r][t], pairs[t], few);
        }
#else
        __m512 some[TILES], others[TILES];
        VIASD_ALL(t, TILES) {
          const __m512i pairs = read_ahead(weight[t] + k * 64, ask[t] + k * 64);
          some[t] = firsts_of(pairs), others[t] = seconds_of(pairs);
        }
        VIASD_ALL(r, COUNT) {
          const __m512 one = (__m512)broadcast(r, pair * 8), two = (__m512)broadcast(r, pair * 8 + 4);
          VIASD_ALL(t, TILES) sums[r][t] = with_products(sums[r][t], some[t], one);
          VIASD_ALL(t, TILES) sums[r][t] = with_products(sums[r][t], others[t], two);
        }
#endif
      }
    }
    VIASD_ALL(r, COUNT) VIASD_ALL(t, TILES) to[r][t] = sums[r][t];
    return;
  }
  __m512i sums[COUNT][TILES];
  VIASD_ALL(r, COUNT) VIASD_ALL(t, TILES) sums[r][t] = _mm512_setzero_si512();
  if (linear.format == INT8) {
    for (int g = 0; g < groups; ++g) {
      enter(g);
      for (size_t k = 0; k < GROUP / 4; ++k) {
        __m512i codes[TILES];
        VIASD_ALL(t, TILES) codes[t] = read_ahead(weight[t] + k * 64, ask[t] + k * 64);
        VIASD_ALL(r, COUNT) {
          const __m512i few = broadcast(r, size_t(g) * GROUP + k * 4);
          VIASD_ALL(t, TILES) sums[r][t] = with_products(sums[r][t], codes[t], few);
        }
      }
    }
    for (int r = 0; r < COUNT; ++r) for (int t = 0; t < TILES; ++t)
      to[r][t] = _mm512_mul_ps(scaled(sums[r][t], linear, reading.tiles[t], inputs.sums[first + r]), _mm512_set1_ps(inputs.steps[first + r]));
    return;
  }
  for (int r = 0; r < COUNT; ++r) for (int t = 0; t < TILES; ++t) to[r][t] = _mm512_setzero_ps();
  for (int g = 0; g < groups; ++g) {
    enter(g);
    for (size_t k = 0; k < GROUP; k += 8) {
      __m512i one[TILES], two[TILES];
      VIASD_ALL(t, TILES) unpack(read_ahead(weight[t] + k * 8, ask[t] + k * 8), one[t], two[t]);
      VIASD_ALL(r, COUNT) {
        const __m512i few = broadcast(r, size_t(g) * GROUP + k), more = broadcast(r, size_t(g) * GROUP + k + 4);
        VIASD_ALL(t, TILES) sums[r][t] = with_products(sums[r][t], one[t], few);
        VIASD_ALL(t, TILES) sums[r][t] = with_products(sums[r][t], two[t], more);
      }
    }
    VIASD_ALL(r, COUNT) VIASD_ALL(t, TILES) {
      const size_t at = (size_t(reading.tiles[t]) * groups + g) * TILE;
      to[r][t] = with_group(to[r][t], sums[r][t], linear, at, inputs.sums[(first + r) * groups + g]);
      sums[r][t] = _mm512_setzero_si512();
    }
  }
  for (int r = 0; r < COUNT; ++r) for (int t = 0; t < TILES; ++t)
    to[r][t] = _mm512_mul_ps(to[r][t], _mm512_set1_ps(inputs.steps[first + r]));
}

constexpr int AT_ONCE = 12;  // rows, of which registers hold the sums

// Tiles of so many rows whose sums registers hold.
constexpr int tiles_at_once(int rows) { return rows <= 5 ? 4 : rows <= 8 ? 3 : 2; }

#ifdef __AMX_INT8__
template <int COUNT>
inline void tile_values(const Linear& linear, const Reading& reading, const Inputs& inputs, int first, int rows, Floats (*to)[CHUNK]) {
  const int depth = linear.inputs, stride = depth * bytes_of(linear), groups = depth / GROUP;
  const char* from = inputs.data + size_t(first) * stride;
  alignas(64) int32_t sums[COUNT][ROWS][TILE];
  const int* tiles = reading.tiles;
  const char* const* weight = reading.from;
  shape_tiles(rows);
  if (linear.format == BFLOAT16) {
    tile_product<COUNT, false>(weight, depth / 32, from, stride, sums);
    for (int r = 0; r < rows; ++r) for (int t = 0; t < COUNT; ++t) to[r][t] = _mm512_load_ps((float*)sums[t][r]);
    return;
  }
  if (linear.format == INT8) {
    tile_product<COUNT, true>(weight, groups, from, stride, sums);
    for (int r = 0; r < rows; ++r) for (int t = 0; t < COUNT; ++t) {
      const __m512 value = scaled(_mm512_load_si512(sums[t][r]), linear, tiles[t], inputs.sums[first + r]);
      to[r][t] = _mm512_mul_ps(value, _mm512_set1_ps(inputs.steps[first + r]));
    }
    return;
  }
  for (int r = 0; r < rows; ++r) for (int t = 0; t < COUNT; ++t) to[r][t] = _mm512_setzero_ps();
  alignas(64) char codes[COUNT][1024];
  for (int g = 0; g < groups; ++g) {
    const char* unpacked[COUNT];
    for (int t = 0; t < COUNT; ++t) {
      for (int k = 0; k < 8; ++k) {
        __m512i one, two;
        unpack(_mm512_loadu_si512(weight[t] + size_t(g) * 512 + k * 64), one, two);
        _mm512_store_si512(codes[t] + k * 128, one);
        _mm512_store_si512(codes[t] + k * 128 + 64, two);
      }
      unpacked[t] = codes[t];
    }
    tile_product<COUNT, true>(unpacked, 1, from + g * GROUP, stride, sums);
    for (int r = 0; r < rows; ++r) for (int t = 0; t < COUNT; ++t)
      to[r][t] = with_group(to[r][t], _mm512_load_si512(sums[t][r]), linear, (size_t(tiles[t]) * groups + g) * TILE,
                            inputs.sums[(first + r) * groups + g]);
  }
  for (int r = 0; r < rows; ++r) for (int t = 0; t < COUNT; ++t)
    to[r][t] = _mm512_mul_ps(to[r][t], _mm512_set1_ps(inputs.steps[first + r]));
}

// By tiles some of `rows` rows; how many.
inline int tile_rows(const Linear& linear, const Reading& reading, int count, const Inputs& inputs, int first, int rows, Floats (*to)[CHUNK]) {
  const int taken = std::min(ROWS, rows);
  switch (count) {
    case 4: tile_values<4>(linear, reading, inputs, first, taken, to); break;
    case 3: tile_values<3>(linear, reading, inputs, first, taken, to); break;
    case 2: tile_values<2>(linear, reading, inputs, first, taken, to); break;
    default: tile_values<1>(linear, reading, inputs, first, taken, to);
  }
  return taken;
}
#endif

}  // namespace viasd
