// Products of few rows with packed weights, on CPUs with AVX-512 and VNNI, and with BF16 and AMX where they are there.
//
// A weight [out, in] lies in tiles of 16 outputs, zeros after the last input up to a multiple of 64:
//   bfloat16  [out / 16][in / 2][16][2]
//   int8      [out / 16][in / 4][16][4]
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
constexpr int GROUP = 64;   // inputs that share a step in int4, and to whose multiple inputs are filled up
constexpr int ROWS = 16;    // of an AMX tile

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
  const int32_t* sums;   // int8 and int4: 128 times the sum of codes, as steps
  const float* bias;     // [out] or null
};

#ifdef __AVX512BF16__
using Number = bfloat16;
#else
using Number = float;
#endif

// Inputs as a product reads them. Beside a bfloat16 weight: bfloat16, or float32 where the CPU multiplies no bfloat16
// numbers. Else: 8 bits with one step a row, 128 for zero. A token has a row for each plane. Each thread makes its own.
struct Inputs {
  char* data;        // [rows][inputs]
  float* steps;      // [rows]
  int32_t* sums;     // [rows][inputs / 64], of codes less 128; for int4
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

// 16 numbers as codes of 8 bits with 128 for zero.
inline void put_codes(char* to, __m512i codes) {
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(_mm512_add_epi32(codes, _mm512_set1_epi32(128))));
}

// Zeros after `count` codes of a row, and what int4 has to know of it.
inline void finish_codes(const Linear& linear, char* data, int count, int row, const Inputs& to) {
  std::memset(data + count, 128, linear.inputs - count);
  if (linear.format != INT4) return;
  for (int group = 0; group < linear.inputs / GROUP; ++group) {
    const __m512i codes = _mm512_loadu_si512(data + group * GROUP);
    const __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, _mm512_set1_epi8(1));
    to.sums[row * (linear.inputs / GROUP) + group] = _mm512_reduce_add_epi32(sum) - 128 * GROUP;
  }
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
  __m512 largest = _mm512_setzero_ps();
  for (int i = 0; i < count; i += 16) largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(token + i)));
  const float top = _mm512_reduce_max_ps(largest), step = top > 0 ? top / 127 : 1, fine = step / 254;
  const __m512 coarse_step = _mm512_set1_ps(step), fine_step = _mm512_set1_ps(fine);
  char* rest = data + linear.inputs;
  to.steps[row] = step;
  for (int i = 0; i < count; i += 16) {
    const __m512 values = _mm512_loadu_ps(token + i);
    const __m512i codes = _mm512_cvtps_epi32(_mm512_div_ps(values, coarse_step));
    put_codes(data + i, codes);
    if (linear.planes == 1) continue;
    const __m512 left = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(codes), coarse_step, values);
    put_codes(rest + i, _mm512_cvtps_epi32(_mm512_div_ps(left, fine_step)));
  }
  finish_codes(linear, data, count, row, to);
  if (linear.planes == 1) return;
  to.steps[row + 1] = fine;
  finish_codes(linear, rest, count, row + 1, to);
}

// The codes of eight inputs of 16 outputs: those of the first four, and of the others.
inline void unpack(const char* from, __m512i& first, __m512i& second) {
  const __m512i both = _mm512_loadu_si512(from), low = _mm512_set1_epi8(15);
  first = _mm512_and_si512(both, low);
  second = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
}

inline __m512 scaled(__m512i sum, const Linear& linear, size_t at) {
  const __m512i whole = _mm512_sub_epi32(sum, _mm512_loadu_si512(linear.sums + at));
  return _mm512_mul_ps(_mm512_cvtepi32_ps(whole), _mm512_loadu_ps(linear.steps + at));
}

inline __m512 with_group(__m512 total, __m512i sum, const Linear& linear, size_t at, int32_t inputs_sum) {
  total = _mm512_add_ps(total, scaled(sum, linear, at));
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
    if (WHOLE) _tile_dpbusd(number, 4, tile); else _tile_dpbf16ps(number, 4, tile); \
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

// Values of COUNT tiles of outputs for a few rows, without bias: to[row][tile].
template <int ROW_COUNT, int COUNT>
inline void vector_product(const Linear& linear, const int* tiles, const Inputs& inputs, int first, __m512 (*to)[COUNT]) {
  const int depth = linear.inputs, stride = depth * bytes_of(linear), groups = depth / GROUP;
  const char* rows = inputs.data + size_t(first) * stride;
  const char* weight[COUNT];
  for (int t = 0; t < COUNT; ++t) weight[t] = (const char*)linear.weight + tiles[t] * tile_bytes(linear);
  const auto broadcast = [&](int row, int byte) {
    int32_t few;
    std::memcpy(&few, rows + size_t(row) * stride + byte, 4);
    return _mm512_set1_epi32(few);
  };
  if (linear.format == BFLOAT16) {
    for (int r = 0; r < ROW_COUNT; ++r) for (int t = 0; t < COUNT; ++t) to[r][t] = _mm512_setzero_ps();
    for (int k = 0; k < depth / 2; ++k) {
      __m512i values[COUNT];
      for (int t = 0; t < COUNT; ++t) values[t] = _mm512_loadu_si512(weight[t] + size_t(k) * 64);
#ifdef __AVX512BF16__
      for (int r = 0; r < ROW_COUNT; ++r) {
        const __m512i few = broadcast(r, k * 4);
        for (int t = 0; t < COUNT; ++t) to[r][t] = _mm512_dpbf16_ps(to[r][t], (__m512bh)few, (__m512bh)values[t]);
      }
#else
      for (int r = 0; r < ROW_COUNT; ++r) {
        const float* two = (const float*)(rows + size_t(r) * stride) + size_t(k) * 2;
        const __m512 first = _mm512_set1_ps(two[0]), second = _mm512_set1_ps(two[1]);
        for (int t = 0; t < COUNT; ++t)
          to[r][t] = _mm512_fmadd_ps(seconds_of(values[t]), second, _mm512_fmadd_ps(firsts_of(values[t]), first, to[r][t]));
      }
#endif
    }
    return;
  }
  __m512i sums[ROW_COUNT][COUNT];
  for (int r = 0; r < ROW_COUNT; ++r) for (int t = 0; t < COUNT; ++t) {
    sums[r][t] = _mm512_setzero_si512();
    to[r][t] = _mm512_setzero_ps();
  }
  if (linear.format == INT8) {
    for (int k = 0; k < depth / 4; ++k) {
      __m512i values[COUNT];
      for (int t = 0; t < COUNT; ++t) values[t] = _mm512_loadu_si512(weight[t] + size_t(k) * 64);
      for (int r = 0; r < ROW_COUNT; ++r) {
        const __m512i few = broadcast(r, k * 4);
        for (int t = 0; t < COUNT; ++t) sums[r][t] = _mm512_dpbusd_epi32(sums[r][t], few, values[t]);
      }
    }
    for (int r = 0; r < ROW_COUNT; ++r) for (int t = 0; t < COUNT; ++t)
      to[r][t] = _mm512_mul_ps(scaled(sums[r][t], linear, size_t(tiles[t]) * TILE), _mm512_set1_ps(inputs.steps[first + r]));
    return;
  }
  for (int g = 0; g < groups; ++g) {
    for (int k = 0; k < GROUP; k += 8) {
      __m512i one[COUNT], two[COUNT];
      for (int t = 0; t < COUNT; ++t) unpack(weight[t] + size_t(g) * 512 + k * 8, one[t], two[t]);
      for (int r = 0; r < ROW_COUNT; ++r) {
        const __m512i few = broadcast(r, g * GROUP + k), more = broadcast(r, g * GROUP + k + 4);
        for (int t = 0; t < COUNT; ++t)
          sums[r][t] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sums[r][t], few, one[t]), more, two[t]);
      }
    }
    for (int r = 0; r < ROW_COUNT; ++r) for (int t = 0; t < COUNT; ++t) {
      const size_t at = (size_t(tiles[t]) * groups + g) * TILE;
      to[r][t] = with_group(to[r][t], sums[r][t], linear, at, inputs.sums[(first + r) * groups + g]);
      sums[r][t] = _mm512_setzero_si512();
    }
  }
  for (int r = 0; r < ROW_COUNT; ++r) for (int t = 0; t < COUNT; ++t)
    to[r][t] = _mm512_mul_ps(to[r][t], _mm512_set1_ps(inputs.steps[first + r]));
}

#ifdef __AMX_INT8__
template <int COUNT>
inline void tile_values(const Linear& linear, const int* tiles, const Inputs& inputs, int first, int rows, __m512 (*to)[COUNT]) {
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
      const __m512 value = scaled(_mm512_load_si512(sums[t][r]), linear, size_t(tiles[t]) * TILE);
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
        unpack(weight[t] + size_t(g) * 512 + k * 64, one, two);
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

// Calls put(token, tile numbers, values, tiles) for some tiles of outputs and every token.
template <int COUNT, class Put>
inline void multiply_tiles(const Linear& linear, const int* tiles, const Inputs& inputs, int tokens, bool amx, const Put& put) {
  const int rows = tokens * linear.planes;
  const auto give = [&](int first, int count, __m512 (*values)[COUNT]) {
    for (int r = 0; r < count; r += linear.planes) {
      if (linear.planes == 2)
        for (int t = 0; t < COUNT; ++t) values[r][t] = _mm512_add_ps(values[r][t], values[r + 1][t]);
      if (linear.bias)
        for (int t = 0; t < COUNT; ++t)
          values[r][t] = _mm512_add_ps(values[r][t], _mm512_loadu_ps(linear.bias + size_t(tiles[t]) * TILE));
      put((first + r) / linear.planes, tiles, values[r], COUNT);
    }
  };
#ifdef __AMX_INT8__
  // Four bits are unpacked for every product: beside few rows that takes longer than the product of vectors.
  if (amx && (linear.format != INT4 || rows > 4)) {
    __m512 values[ROWS][COUNT];
    for (int first = 0; first < rows; first += ROWS) {
      const int count = std::min(ROWS, rows - first);
      tile_values<COUNT>(linear, tiles, inputs, first, count, values);
      give(first, count, values);
    }
    return;
  }
#endif
  __m512 values[4][COUNT];
  int first = 0;
  for (; rows - first >= 4; first += 4) vector_product<4, COUNT>(linear, tiles, inputs, first, values), give(first, 4, values);
  switch (rows - first) {
    case 3: vector_product<3, COUNT>(linear, tiles, inputs, first, values); break;
    case 2: vector_product<2, COUNT>(linear, tiles, inputs, first, values); break;
    case 1: vector_product<1, COUNT>(linear, tiles, inputs, first, values); break;
    default: return;
  }
  give(first, rows - first, values);
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
    int numbers[4];
    for (int t = 0; t < count; ++t) numbers[t] = linear.tile_pairs ? (first + t) / 2 + (t % 2 ? half : 0) : first + t;
    switch (count) {
      case 4: multiply_tiles<4>(linear, numbers, *inputs, tokens, amx, put); break;
      case 3: multiply_tiles<3>(linear, numbers, *inputs, tokens, amx, put); break;
      case 2: multiply_tiles<2>(linear, numbers, *inputs, tokens, amx, put); break;
      default: multiply_tiles<1>(linear, numbers, *inputs, tokens, amx, put);
    }
  });
}

}  // namespace viasd
