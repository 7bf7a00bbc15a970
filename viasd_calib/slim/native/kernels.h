// Products of few rows with packed weights, on CPUs with AVX-512 and VNNI, and with BF16 and AMX where they are there.
//
// A weight [out, in] lies in tiles of 16 outputs, zeros after the last input up to a multiple of 64:
//   bfloat16  [out / 16][in / 2][16][2]
//   int8      [out / 16][in / 4][16][4], codes and 128
//   int4      [out / 16][in / 64][8][16][4] bytes: inputs 8 i + j in the low halves, 8 i + 4 + j in the high ones
// so one vector of 64 bytes has some inputs of 16 outputs. Each row of a product is summed in an order that does not
// depend on the other rows: a pass of one token and one of sixteen give the same bits.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <sched.h>

namespace viasd {

using bfloat16 = uint16_t;

constexpr int TILE = 16;    // outputs
constexpr float SMALLEST_STEP = 1e-30f;  // of inputs: a row of smaller numbers is zeros, for its step would have no inverse
constexpr int GROUP = 64;   // inputs that share a step in int4, and to whose multiple inputs are filled up
constexpr int ROWS = 16;    // that a product takes at once, at most: of an AMX tile, or of registers
constexpr int CHUNK = 4;    // tiles of outputs that a thread takes at once, at most
constexpr int AHEAD = 4096; // bytes of a tile that are asked for before they are read: products of many rows hide reading

enum Format : int32_t { BFLOAT16 = 1, INT8 = 2, INT4 = 3 };

struct Linear {
  int32_t format;
  int32_t inputs;        // with the zeros
  int32_t outputs;       // with the zeros
  int32_t tile_pairs;    // 1: tiles of the first and the second half are taken in pairs (gate and up)
  int32_t planes;        // of an input: 2 for 16 bits beside int8 and int4, codes and what they leave in 1/254 steps; else 1
  int32_t padding;
  const void* weight;
  const float* steps;    // int8 [out], int4 [out / 16][in / 64][16]
  const float* lowest;   // int4: the value of code 0, as steps
  const float* bias;     // [out] or null
};

#ifdef __AVX512BF16__
using Number = bfloat16;
#else
using Number = float;
#endif

// Inputs as a product reads them. Beside a bfloat16 weight: bfloat16, or float32 where the CPU multiplies no bfloat16
// numbers. Else: 8 bits with one step a row. A token has a row for each plane. Each thread makes its own.
struct Inputs {
  char* data;        // [rows][inputs]
  float* steps;      // [rows]
  int32_t* sums;     // of codes: int4 [rows][inputs / 64], int8 [rows]
};

// Of an input.
inline int bytes_of(const Linear& linear) { return linear.format == BFLOAT16 ? sizeof(Number) : 1; }

// From one tile of outputs to the next.
inline size_t tile_bytes(const Linear& linear) {
  const size_t half_bytes = linear.format == BFLOAT16 ? 4 : linear.format == INT8 ? 2 : 1;
  return size_t(linear.inputs) * TILE * half_bytes / 2;
}

inline __m512 widen(const bfloat16* from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16));
}

// Rounded to the nearest bfloat16, a tie to the even one.
inline __m256i narrowed_to_16(__m512 values) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(values);
#else
  const __m512i bits = _mm512_castps_si512(values), last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7FFF))), 16);
  const __mmask16 no_number = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, no_number, _mm512_set1_epi32(0x7FC0)));
#endif
}

inline void narrow(bfloat16* to, __m512 values) { _mm256_storeu_si256((__m256i*)to, narrowed_to_16(values)); }

inline void put_numbers(bfloat16* to, __m512 values) { narrow(to, values); }
inline void put_numbers(float* to, __m512 values) { _mm512_storeu_ps(to, values); }

// Of 16 pairs of bfloat16 numbers, the first and the second of each.
inline __m512 firsts_of(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline __m512 seconds_of(__m512i pairs) { return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xFFFF0000)))); }

// e^x, within 2 units in the last place from -87 to 88 (Cephes' polynomial).
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

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
  const int row = number * linear.planes;
  char* data = to.data + size_t(row) * linear.inputs * bytes_of(linear);
  if (linear.format == BFLOAT16) {
    for (int i = 0; i < count; i += 16) put_numbers((Number*)data + i, _mm512_loadu_ps(token + i));
    std::memset((Number*)data + count, 0, size_t(linear.inputs - count) * sizeof(Number));
    return;
  }
  // Sizes are compared as bits, in which what is no number is above all: a maximum of numbers would lose it.
  __m512i largest = _mm512_setzero_si512();
  for (int i = 0; i < count; i += 16) largest = _mm512_max_epu32(largest, _mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(token + i))));
  const uint32_t top_bits = _mm512_reduce_max_epu32(largest);
  float top;
  std::memcpy(&top, &top_bits, sizeof top);
  const float asked = top / 127, step = asked < SMALLEST_STEP ? 1 : asked, fine = step / 254;
  const __m512 coarse_step = _mm512_set1_ps(step), steps = _mm512_set1_ps(1 / step), fine_steps = _mm512_set1_ps(1 / fine);
  char* rest = data + linear.inputs;
  to.steps[row] = step;
  for (int i = 0; i < count; i += 16) {
    const __m512 values = _mm512_loadu_ps(token + i);
    const __m512i codes = _mm512_cvtps_epi32(_mm512_mul_ps(values, steps));
    put_codes(data + i, codes);
    if (linear.planes == 1) continue;
    const __m512 left = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(codes), coarse_step, values);
    put_codes(rest + i, _mm512_cvtps_epi32(_mm512_mul_ps(left, fine_steps)));
  }
  finish_codes(linear, data, count, row, to);
  if (linear.planes == 1) return;
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

// sum + the products of weights, or of neighbouring ones, with inputs. In assembly, since GCC 12 copies the sums of
// the intrinsics to the stack and back.
inline __m512 with_products(__m512 sum, __m512 weights, __m512 inputs) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(inputs));
  return sum;
}

inline __m512i with_products(__m512i sum, __m512i codes, __m512i inputs) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(inputs));
  return sum;
}

#ifdef __AVX512BF16__
inline __m512 with_products(__m512 sum, __m512i weights, __m512i inputs) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(inputs));
  return sum;
}
#endif

#define VIASD_ALL(index, count) _Pragma("GCC unroll 16") for (int index = 0; index < count; ++index)

// A vector of the weight, and a request for one that comes later.
inline __m512i read_ahead(const char* from) {
  _mm_prefetch(from + AHEAD, _MM_HINT_T0);
  return _mm512_loadu_si512(from);
}

// Values of TILES tiles of outputs for COUNT rows, without bias: to[row][tile]. Each vector of the weight is read once,
// and multiplied by all rows.
template <int COUNT, int TILES>
inline void vector_product(const Linear& linear, const int* tiles, const Inputs& inputs, int first, __m512 (*to)[CHUNK]) {
  const int depth = linear.inputs, groups = depth / GROUP;
  const size_t stride = size_t(depth) * bytes_of(linear);
  const char* rows = inputs.data + first * stride;
  const char* weight[TILES];
  VIASD_ALL(t, TILES) weight[t] = (const char*)linear.weight + tiles[t] * tile_bytes(linear);
  const auto broadcast = [&](int row, size_t byte) {
    int32_t few;
    std::memcpy(&few, rows + row * stride + byte, 4);
    return _mm512_set1_epi32(few);
  };
  if (linear.format == BFLOAT16) {
    __m512 sums[COUNT][TILES];
    VIASD_ALL(r, COUNT) VIASD_ALL(t, TILES) sums[r][t] = _mm512_setzero_ps();
    for (size_t k = 0; k < size_t(depth) / 2; ++k) {
#ifdef __AVX512BF16__
      __m512i pairs[TILES];
      VIASD_ALL(t, TILES) pairs[t] = read_ahead(weight[t] + k * 64);
      VIASD_ALL(r, COUNT) {
        const __m512i few = broadcast(r, k * 4);
        VIASD_ALL(t, TILES) sums[r][t] = with_products(sums[r][t], pairs[t], few);
      }
#else
      __m512 some[TILES], others[TILES];
      VIASD_ALL(t, TILES) {
        const __m512i pairs = read_ahead(weight[t] + k * 64);
        some[t] = firsts_of(pairs), others[t] = seconds_of(pairs);
      }
      VIASD_ALL(r, COUNT) {
        const __m512 one = (__m512)broadcast(r, k * 8), two = (__m512)broadcast(r, k * 8 + 4);
        VIASD_ALL(t, TILES) sums[r][t] = with_products(sums[r][t], some[t], one);
        VIASD_ALL(t, TILES) sums[r][t] = with_products(sums[r][t], others[t], two);
      }
#endif
    }
    VIASD_ALL(r, COUNT) VIASD_ALL(t, TILES) to[r][t] = sums[r][t];
    return;
  }
  __m512i sums[COUNT][TILES];
  VIASD_ALL(r, COUNT) VIASD_ALL(t, TILES) sums[r][t] = _mm512_setzero_si512();
  if (linear.format == INT8) {
    for (size_t k = 0; k < size_t(depth) / 4; ++k) {
      __m512i codes[TILES];
      VIASD_ALL(t, TILES) codes[t] = read_ahead(weight[t] + k * 64);
      VIASD_ALL(r, COUNT) {
        const __m512i few = broadcast(r, k * 4);
        VIASD_ALL(t, TILES) sums[r][t] = with_products(sums[r][t], codes[t], few);
      }
    }
    for (int r = 0; r < COUNT; ++r) for (int t = 0; t < TILES; ++t)
      to[r][t] = _mm512_mul_ps(scaled(sums[r][t], linear, tiles[t], inputs.sums[first + r]), _mm512_set1_ps(inputs.steps[first + r]));
    return;
  }
  for (int r = 0; r < COUNT; ++r) for (int t = 0; t < TILES; ++t) to[r][t] = _mm512_setzero_ps();
  for (size_t g = 0; g < size_t(groups); ++g) {
    for (size_t k = 0; k < GROUP; k += 8) {
      __m512i one[TILES], two[TILES];
      VIASD_ALL(t, TILES) unpack(read_ahead(weight[t] + g * 512 + k * 8), one[t], two[t]);
      VIASD_ALL(r, COUNT) {
        const __m512i few = broadcast(r, g * GROUP + k), more = broadcast(r, g * GROUP + k + 4);
        VIASD_ALL(t, TILES) sums[r][t] = with_products(sums[r][t], one[t], few);
        VIASD_ALL(t, TILES) sums[r][t] = with_products(sums[r][t], two[t], more);
      }
    }
    VIASD_ALL(r, COUNT) VIASD_ALL(t, TILES) {
      to[r][t] = with_group(to[r][t], sums[r][t], linear, (size_t(tiles[t]) * groups + g) * TILE, inputs.sums[(first + r) * groups + g]);
      sums[r][t] = _mm512_setzero_si512();
    }
  }
  for (int r = 0; r < COUNT; ++r) for (int t = 0; t < TILES; ++t)
    to[r][t] = _mm512_mul_ps(to[r][t], _mm512_set1_ps(inputs.steps[first + r]));
}

// The same for a chunk of tiles, as many at once as registers hold sums of.
template <int COUNT>
inline void chunk_product(const Linear& linear, const int* tiles, int count, const Inputs& inputs, int first, __m512 (*to)[CHUNK]) {
  constexpr int MOST = COUNT <= 5 ? 4 : COUNT <= 8 ? 3 : 2;
  const int parts = (count + MOST - 1) / MOST;
  for (int t = 0; t < count;) {
    const int taken = std::min((count + parts - 1) / parts, count - t);
    const auto own = (__m512 (*)[CHUNK])(&to[0][t]);
    switch (taken) {
      case 4: vector_product<COUNT, std::min(MOST, 4)>(linear, tiles + t, inputs, first, own); break;
      case 3: vector_product<COUNT, std::min(MOST, 3)>(linear, tiles + t, inputs, first, own); break;
      case 2: vector_product<COUNT, std::min(MOST, 2)>(linear, tiles + t, inputs, first, own); break;
      default: vector_product<COUNT, 1>(linear, tiles + t, inputs, first, own);
    }
    t += taken;
  }
}

// Some of `rows` rows, at most AT_ONCE and an even number of them where a token has two; how many.
inline int some_rows(const Linear& linear, const int* tiles, int count, const Inputs& inputs, int first, int rows, __m512 (*to)[CHUNK]) {
  constexpr int AT_ONCE = 12;
  const int parts = (rows + AT_ONCE - 1) / AT_ONCE, even = (rows + parts - 1) / parts, taken = even + even % linear.planes;
  switch (taken) {
#define VIASD_ROWS(number) case number: chunk_product<number>(linear, tiles, count, inputs, first, to); break;
    VIASD_ROWS(1) VIASD_ROWS(2) VIASD_ROWS(3) VIASD_ROWS(4) VIASD_ROWS(5) VIASD_ROWS(6)
    VIASD_ROWS(7) VIASD_ROWS(8) VIASD_ROWS(9) VIASD_ROWS(10) VIASD_ROWS(11) VIASD_ROWS(12)
#undef VIASD_ROWS
  }
  return taken;
}

#ifdef __AMX_INT8__
template <int COUNT>
inline void tile_values(const Linear& linear, const int* tiles, const Inputs& inputs, int first, int rows, __m512 (*to)[CHUNK]) {
  const int depth = linear.inputs, stride = depth * bytes_of(linear), groups = depth / GROUP;
  const char* from = inputs.data + size_t(first) * stride;
  alignas(64) int32_t sums[COUNT][ROWS][TILE];
  const char* weight[COUNT];
  for (int t = 0; t < COUNT; ++t) weight[t] = (const char*)linear.weight + tiles[t] * tile_bytes(linear);
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
#endif

// Calls put(token, tile numbers, values, tiles) for a chunk of tiles of outputs and every token.
template <class Put>
inline void multiply_tiles(const Linear& linear, const int* tiles, int count, const Inputs& inputs, int tokens, bool amx, const Put& put) {
  const int rows = tokens * linear.planes;
  __m512 values[ROWS][CHUNK];
  for (int first = 0, taken; first < rows; first += taken) {
#ifdef __AMX_INT8__
    // Four bits are unpacked for every product: beside few rows that takes longer than the product of vectors.
    if (amx && (linear.format != INT4 || rows > 4)) {
      taken = std::min(ROWS, rows - first);
      switch (count) {
        case 4: tile_values<4>(linear, tiles, inputs, first, taken, values); break;
        case 3: tile_values<3>(linear, tiles, inputs, first, taken, values); break;
        case 2: tile_values<2>(linear, tiles, inputs, first, taken, values); break;
        default: tile_values<1>(linear, tiles, inputs, first, taken, values);
      }
    } else
#endif
      taken = some_rows(linear, tiles, count, inputs, first, rows - first, values);
    for (int r = 0; r < taken; r += linear.planes) {
      if (linear.planes == 2)
        for (int t = 0; t < count; ++t) values[r][t] = _mm512_add_ps(values[r][t], values[r + 1][t]);
      if (linear.bias)
        for (int t = 0; t < count; ++t)
          values[r][t] = _mm512_add_ps(values[r][t], _mm512_loadu_ps(linear.bias + size_t(tiles[t]) * TILE));
      put((first + r) / linear.planes, tiles, values[r], count);
    }
  }
}

// Work that threads share. A thread that comes late, since another process has its core, finds the chunks taken and
// waits for none but those that are still being worked on: so nobody waits for a thread that does not run.
struct alignas(64) Stage {
  std::atomic<int> taken{0}, done{0};
};

constexpr int SPINS = 4000;  // of a waiting thread, before it lets others run: a busy machine needs the core

// Calls work(chunk) for chunks 0 to count - 1, each once, by whichever thread is free; returns when all are done.
template <class Work>
inline void share(Stage& stage, int count, const Work& work) {
  for (int chunk; (chunk = stage.taken.fetch_add(1, std::memory_order_relaxed)) < count;) {
    work(chunk);
    stage.done.fetch_add(1, std::memory_order_release);
  }
  for (int spin = 0; stage.done.load(std::memory_order_acquire) < count; ++spin)
    if (spin < SPINS) _mm_pause(); else sched_yield();
}

// The inputs of some tokens times the weight, shared among threads; `put` as above. `make_inputs` is called by each
// thread that has taken a chunk: as long as one is not done, nobody changes what inputs are made of.
template <class Make, class Put>
inline void multiply(const Linear& linear, const Make& make_inputs, int tokens, Stage& stage, int threads, bool amx, const Put& put) {
  const int tiles = linear.outputs / TILE, half = tiles / 2;
  int at_once = 2;
  for (int count : {4, 3})
    if (!(linear.tile_pairs && count == 3) && tiles % count == 0 && ((tiles / count) % threads == 0 || tiles > 16 * threads)) {
      at_once = count;
      break;
    }
  const Inputs* inputs = nullptr;
  share(stage, (tiles + at_once - 1) / at_once, [&](int chunk) {
    if (!inputs) inputs = &make_inputs();
    const int first = chunk * at_once, count = std::min(at_once, tiles - first);
    int numbers[CHUNK];
    for (int t = 0; t < count; ++t) numbers[t] = linear.tile_pairs ? (first + t) / 2 + (t % 2 ? half : 0) : first + t;
    multiply_tiles(linear, numbers, count, *inputs, tokens, amx, put);
  });
}

}  // namespace viasd
