// Weights of linear layers as the kernels read them, and their inputs.
//
// A weight [out, in] lies in tiles of 16 outputs, zeros after the last input up to a multiple of 64:
//   bfloat16  [out / 16][in / 2][16][2]
//   int8      [out / 16][in / 4][16][4], codes and 128
//   int4      [out / 16][in / 64][8][16][4] bytes: inputs 8 i + j in the low halves, 8 i + 4 + j in the high ones
// so one vector of 64 bytes has some inputs of 16 outputs.
#pragma once

#include "vectors.h"

namespace viasd {

constexpr int TILE = 16;    // outputs
constexpr float SMALLEST_STEP = 1e-30f;  // of inputs: a row of smaller numbers is zeros, for its step would have no inverse
constexpr int GROUP = 64;   // inputs that share a step in int4, and to whose multiple inputs are filled up
constexpr int ROWS = 16;    // that a product takes at once, at most: of an AMX tile, or of registers
constexpr int CHUNK = 4;    // tiles of outputs that a thread takes at once, at most
constexpr int FINE = 254;   // fine steps of an input of 16 bits in a coarse one, of which the largest has 127

enum Format : int32_t { BFLOAT16 = 1, INT8 = 2, INT4 = 3 };

struct Linear {
  int32_t format;
  int32_t inputs;        // with the zeros
  int32_t outputs;       // with the zeros
  int32_t tile_pairs;    // 1: tiles of the first and the second half are taken in pairs (gate and up)
  int32_t input_bits;    // beside int8 and int4: 16 or 8
  int32_t padding;
  const void* weight;
  const float* steps;    // int8 [out], int4 [out / 16][in / 64][16]
  const float* lowest;   // int4: the value of code 0, as steps
  const float* bias;     // [out] or null
};

// Inputs as a product reads them, see put_token. Each thread makes its own.
struct Inputs {
  char* data;        // [rows][inputs]
  float* steps;      // [rows]
  int32_t* sums;     // of codes: int4 [rows][inputs / 64], int8 by row or by block
};

// From one tile of outputs to the next.
inline size_t tile_bytes(const Linear& linear) {
  const size_t half_bytes = linear.format == BFLOAT16 ? 4 : linear.format == INT8 ? 2 : 1;
  return size_t(linear.inputs) * TILE * half_bytes / 2;
}

inline const char* tile_of(const Linear& linear, int tile) { return (const char*)linear.weight + tile * tile_bytes(linear); }

// Tiles of a weight that a product reads.
struct Reading {
  const int* tiles;         // their numbers
  const char* const* from;  // where they lie, and behind them as many that will be read next
};

// What to ask for when `tile` of `count` is read at an offset: without the next ones the first bytes of each tile, a
// quarter to all of it, would be waited for.
inline const char* later(const Reading& reading, int tile, int count, size_t offset, size_t bytes) {
  const size_t asked = offset + std::min<size_t>(AHEAD, bytes);
  return asked < bytes ? reading.from[tile] + asked : reading.from[count + tile] + (asked - bytes);
}

// What is multiplied by bfloat16 weights: the same, or float32 where the CPU multiplies no bfloat16 numbers.
#ifdef __AVX512BF16__
using Number = bfloat16;
#else
using Number = float;
#endif

inline void put_numbers(bfloat16* to, Floats values) { narrow(to, values); }
inline void put_numbers(float* to, Floats values) { store(to, values); }

// The `count` numbers of a token beside a bfloat16 weight, and zeros; count is a multiple of 16.
inline void put_row(const Linear& linear, const float* token, int count, Number* to) {
  for (int i = 0; i < count; i += 16) put_numbers(to + i, load(token + i));
  std::memset(to + count, 0, size_t(linear.inputs - count) * sizeof(Number));
}

// The coarse step of the `count` numbers of a token beside a weight in 8 or 4 bits.
inline float step_of(const float* token, int count) {
  Ints largest = all(0);  // compared as bits: a maximum of numbers would lose what is none
  for (int i = 0; i < count; i += 16) largest = larger(largest, sizes_of(load(token + i)));
  const int32_t bits = largest_of(largest);
  float top;
  std::memcpy(&top, &bits, sizeof top);
  const float asked = top / 127;
  return asked < SMALLEST_STEP ? 1 : asked;
}

}  // namespace viasd
