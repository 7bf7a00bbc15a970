// Products of few rows with packed weights by AVX2. Beside a bfloat16 weight inputs are float32; beside 8 or 4 bits they
// are whole numbers of 16, whose products with neighbouring codes are summed in 32.
#pragma once

#include "linear.h"

namespace viasd {

constexpr bool AMX = false;
constexpr int AT_ONCE = 6;   // rows, of which registers hold the sums
constexpr int BLOCK = 512;   // inputs whose products with codes of 8 bits fit into 32: 512 * 127 * (127 * 254 + 127) < 2^31

// Tiles of so many rows whose sums registers hold.
constexpr int tiles_at_once(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

inline void forget_tiles() {}

// Rows of a token.
inline int planes_of(const Linear&) { return 1; }

// Of an input.
inline int bytes_of(const Linear& linear) { return linear.format == BFLOAT16 ? sizeof(Number) : sizeof(int16_t); }

// Inputs whose codes have a sum of their own.
inline int block_of(const Linear& linear) { return linear.format == INT4 ? GROUP : BLOCK; }

inline int blocks_of(const Linear& linear) { return (linear.inputs + block_of(linear) - 1) / block_of(linear); }

// The `count` numbers of a token as `linear` reads them; count is a multiple of 16. Of four whole numbers the second and
// the third change places, since products take the even and the odd codes of a weight apart.
inline void put_token(const Linear& linear, const float* token, int count, int row, const Inputs& to) {
  char* data = to.data + size_t(row) * linear.inputs * bytes_of(linear);
  if (linear.format == BFLOAT16) {
    put_row(linear, token, count, (Number*)data);
    return;
  }
  const bool wide = linear.input_bits == 16;
  const float step = step_of(token, count), fine = step / FINE;
  const Floats coarse_step = all(step), steps = all(1 / step), fine_steps = all(1 / fine);
  to.steps[row] = wide ? fine : step;
  int16_t* codes = (int16_t*)data;
  const auto nearest = [](Floats values) { return Ints{_mm256_cvtps_epi32(values.low), _mm256_cvtps_epi32(values.high)}; };
  for (int i = 0; i < count; i += 16) {
    const Floats values = load(token + i);
    Ints found = nearest(values * steps);
    if (wide) {  // as coarse steps and what they leave in fine ones, so that other CPUs give the same numbers
      const Ints rest = nearest(less_fused(floats_from(found), coarse_step, values) * fine_steps);
      found = added({_mm256_mullo_epi32(found.low, _mm256_set1_epi32(FINE)), _mm256_mullo_epi32(found.high, _mm256_set1_epi32(FINE))}, rest);
    }
    const __m256i narrow = _mm256_permute4x64_epi64(_mm256_packs_epi32(found.low, found.high), 0xD8);
    _mm256_storeu_si256((__m256i*)(codes + i), _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(narrow, 0xD8), 0xD8));
  }
  std::memset(codes + count, 0, size_t(linear.inputs - count) * sizeof(int16_t));
  const int block = block_of(linear), blocks = blocks_of(linear);
  for (int b = 0; b < blocks; ++b) {
    __m256i sum = _mm256_setzero_si256();
    for (int i = b * block; i < std::min((b + 1) * block, linear.inputs); i += 16)
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_loadu_si256((const __m256i*)(codes + i)), _mm256_set1_epi16(1)));
    alignas(32) int32_t eight[8];
    _mm256_store_si256((__m256i*)eight, sum);
    int32_t whole = 0;
    for (int32_t one : eight) whole += one;
    to.sums[row * blocks + b] = whole;
  }
}

// sum + the products of neighbouring whole numbers of 16 bits. In assembly, since GCC 12 puts additions off, and for that
// copies what is to be added to the stack and back.
inline __m256i with_pairs(__m256i sum, __m256i codes, __m256i inputs) {
  __m256i products;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(codes), "x"(inputs));
  return sum;
}

// Adds to the sums of COUNT rows and TILES tiles what neighbouring inputs make of the BITS bits from SHIFT on of each 16
// bits of codes; `place` is that of the two inputs in a row, in bytes.
template <int BITS, int SHIFT, int COUNT, int TILES>
inline void add_pairs(const Ints (&codes)[TILES], const char* rows, size_t stride, size_t place, Ints (&sums)[COUNT][TILES]) {
  const auto taken = [](__m256i some) {
    const __m256i low = SHIFT ? _mm256_srli_epi16(some, SHIFT) : some;
    return SHIFT + BITS < 16 ? _mm256_and_si256(low, _mm256_set1_epi16((1 << BITS) - 1)) : low;
  };
  Ints own[TILES];
  VIASD_ALL(t, TILES) own[t] = {taken(codes[t].low), taken(codes[t].high)};
  VIASD_ALL(r, COUNT) {
    int32_t two;
    std::memcpy(&two, rows + r * stride + place, 4);
    const __m256i inputs = _mm256_set1_epi32(two);
    VIASD_ALL(t, TILES) sums[r][t] = {with_pairs(sums[r][t].low, own[t].low, inputs), with_pairs(sums[r][t].high, own[t].high, inputs)};
  }
}

// Values of TILES tiles of outputs for COUNT rows, without bias: to[row][tile]. Each vector of the weight is read once,
// and multiplied by all rows.
template <int COUNT, int TILES>
inline void vector_product(const Linear& linear, const Reading& reading, const Inputs& inputs, int first, Floats (*to)[CHUNK]) {
  const int groups = linear.inputs / GROUP;
  const size_t stride = size_t(linear.inputs) * bytes_of(linear), bytes = tile_bytes(linear), group_bytes = bytes / groups;
  const char* rows = inputs.data + first * stride;
  const char *weight[TILES], *ask[TILES];  // of a group of inputs: where it lies, and what is asked for meanwhile
  const auto enter = [&](int group) {
    VIASD_ALL(t, TILES) weight[t] = reading.from[t] + group * group_bytes, ask[t] = later(reading, t, TILES, group * group_bytes, bytes);
  };
  const auto read = [&](Ints (&to)[TILES], size_t offset) { VIASD_ALL(t, TILES) to[t] = read_ahead(weight[t] + offset, ask[t] + offset); };
  if (linear.format == BFLOAT16) {
    Floats sums[COUNT][TILES];
    VIASD_ALL(r, COUNT) VIASD_ALL(t, TILES) sums[r][t] = all(0.0f);
    for (int g = 0; g < groups; ++g) {
      enter(g);
      for (size_t k = 0; k < GROUP / 2; ++k) {
        Ints pairs[TILES];
        read(pairs, k * 64);
        const auto number = [&](int row, size_t place) { return _mm256_broadcast_ss((const float*)(rows + row * stride) + size_t(g) * GROUP + 2 * k + place); };
        VIASD_ALL(r, COUNT) {
          const __m256 one = number(r, 0);
          VIASD_ALL(t, TILES) sums[r][t] = with_products(sums[r][t], {firsts_of(pairs[t].low), firsts_of(pairs[t].high)}, {one, one});
        }
        VIASD_ALL(r, COUNT) {
          const __m256 two = number(r, 1);
          VIASD_ALL(t, TILES) sums[r][t] = with_products(sums[r][t], {seconds_of(pairs[t].low), seconds_of(pairs[t].high)}, {two, two});
        }
      }
    }
    VIASD_ALL(r, COUNT) VIASD_ALL(t, TILES) to[r][t] = sums[r][t];
    return;
  }
  const int block = block_of(linear) / GROUP, blocks = blocks_of(linear);
  for (int r = 0; r < COUNT; ++r) for (int t = 0; t < TILES; ++t) to[r][t] = all(0.0f);
  for (int b = 0; b < blocks; ++b) {
    Ints sums[COUNT][TILES];
    VIASD_ALL(r, COUNT) VIASD_ALL(t, TILES) sums[r][t] = all(0);
    for (int g = b * block; g < std::min((b + 1) * block, groups); ++g) {
      enter(g);
      const char* group = rows + size_t(g) * GROUP * 2;
      if (linear.format == INT8) {
        for (size_t k = 0; k < GROUP; k += 4) {
          Ints codes[TILES];
          read(codes, k * TILE);
          add_pairs<8, 0>(codes, group, stride, k * 2, sums);
          add_pairs<8, 8>(codes, group, stride, k * 2 + 4, sums);
        }
      } else {
        for (size_t k = 0; k < GROUP; k += 8) {
          Ints codes[TILES];
          read(codes, k * TILE / 2);
          add_pairs<4, 0>(codes, group, stride, k * 2, sums);
          add_pairs<4, 8>(codes, group, stride, k * 2 + 4, sums);
          add_pairs<4, 4>(codes, group, stride, k * 2 + 8, sums);
          add_pairs<4, 12>(codes, group, stride, k * 2 + 12, sums);
        }
      }
    }
    for (int r = 0; r < COUNT; ++r) for (int t = 0; t < TILES; ++t) {
      const int32_t codes_sum = inputs.sums[(first + r) * blocks + b];
      if (linear.format == INT8) {
        to[r][t] = to[r][t] + floats_from(added(sums[r][t], all(-128 * codes_sum)));
      } else {
        const size_t at = (size_t(reading.tiles[t]) * blocks + b) * TILE;
        to[r][t] = fused(floats_from(sums[r][t]), load(linear.steps + at), to[r][t]);
        to[r][t] = fused(all(float(codes_sum)), load(linear.lowest + at), to[r][t]);
      }
    }
  }
  for (int r = 0; r < COUNT; ++r) for (int t = 0; t < TILES; ++t) {
    if (linear.format == INT8) to[r][t] = to[r][t] * load(linear.steps + size_t(reading.tiles[t]) * TILE);
    to[r][t] = to[r][t] * all(inputs.steps[first + r]);
  }
}

}  // namespace viasd
