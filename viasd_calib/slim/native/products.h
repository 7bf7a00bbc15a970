// Products of few rows with packed weights, shared among threads. Each row is summed in an order that does not depend on
// the other rows: a pass of one token and one of sixteen give the same bits.
#pragma once

#include <atomic>
#include <chrono>
#include <sched.h>
#include <utility>

#include "linear.h"

#ifdef VIASD_AVX512
#include "products_avx512.h"
#else
#include "products_avx2.h"
#endif

namespace viasd {

// COUNT rows of a chunk of tiles, as many at once as registers hold sums of.
template <int COUNT>
inline void chunk_product(const Linear& linear, const Reading& reading, int count, const Inputs& inputs, int first, Floats (*to)[CHUNK]) {
  constexpr int MOST = tiles_at_once(COUNT);
  const int parts = (count + MOST - 1) / MOST;
  for (int t = 0; t < count;) {
    // Never more than MOST: said, so that the compiler leaves out the cases above it.
    const int taken = std::min({MOST, (count + parts - 1) / parts, count - t});
    const auto own = (Floats (*)[CHUNK])(&to[0][t]);
    const Reading some = {reading.tiles + t, reading.from + t};
    switch (taken) {
      case 4: vector_product<COUNT, std::min(MOST, 4)>(linear, some, inputs, first, own); break;
      case 3: vector_product<COUNT, std::min(MOST, 3)>(linear, some, inputs, first, own); break;
      case 2: vector_product<COUNT, std::min(MOST, 2)>(linear, some, inputs, first, own); break;
      default: vector_product<COUNT, 1>(linear, some, inputs, first, own);
    }
    t += taken;
  }
}

// By vectors some of `rows` rows, at most AT_ONCE and an even number of them where a token has two; how many.
inline int vector_rows(const Linear& linear, const Reading& reading, int count, const Inputs& inputs, int first, int rows, Floats (*to)[CHUNK]) {
  const int parts = (rows + AT_ONCE - 1) / AT_ONCE, even = (rows + parts - 1) / parts, taken = even + even % planes_of(linear);
  switch (taken) {
#define VIASD_ROWS(number) case number: chunk_product<std::min(number, AT_ONCE)>(linear, reading, count, inputs, first, to); break;
    VIASD_ROWS(1) VIASD_ROWS(2) VIASD_ROWS(3) VIASD_ROWS(4) VIASD_ROWS(5) VIASD_ROWS(6)
    VIASD_ROWS(7) VIASD_ROWS(8) VIASD_ROWS(9) VIASD_ROWS(10) VIASD_ROWS(11) VIASD_ROWS(12)
#undef VIASD_ROWS
  }
  return taken;
}

// Some of the rows from `first` to `rows`; how many.
inline int some_rows(const Linear& linear, const Reading& reading, int count, const Inputs& inputs, int first, int rows, [[maybe_unused]] bool amx, Floats (*to)[CHUNK]) {
#ifdef __AMX_INT8__
  // Four bits are unpacked for every product: beside few rows that takes longer than the product of vectors.
  if (amx && (linear.format != INT4 || rows > 4)) return tile_rows(linear, reading, count, inputs, first, rows - first, to);
#endif
  return vector_rows(linear, reading, count, inputs, first, rows - first, to);
}

// Calls put(token, tile numbers, values, tiles) for a chunk of tiles of outputs and every token.
template <class Put>
inline void multiply_tiles(const Linear& linear, const Reading& reading, int count, const Inputs& inputs, int tokens, bool amx, const Put& put) {
  const int planes = planes_of(linear), rows = tokens * planes;
  Floats values[ROWS][CHUNK];
  for (int first = 0, taken; first < rows; first += taken) {
    taken = some_rows(linear, reading, count, inputs, first, rows, amx, values);
    for (int r = 0; r < taken; r += planes) {
      if (planes == 2)
        for (int t = 0; t < count; ++t) values[r][t] = values[r][t] + values[r + 1][t];
      if (linear.bias)
        for (int t = 0; t < count; ++t) values[r][t] = values[r][t] + load(linear.bias + size_t(reading.tiles[t]) * TILE);
      put((first + r) / planes, reading.tiles, values[r], count);
    }
  }
}

// Work that threads share. A thread that comes late, since another process has its core, finds the chunks taken and
// waits for none but those that are still being worked on: so nobody waits for a thread that does not run.
struct alignas(64) Stage {
  std::atomic<int> taken{0}, done{0};
};

constexpr int SPINS = 4000;  // of a waiting thread, before it lets others run: a busy machine needs the core
constexpr std::chrono::microseconds LONG_WAIT(500);  // longer than a chunk of few rows takes: a thread that is waited for does not run

using Clock = std::chrono::steady_clock;

inline thread_local bool waited_long = false;  // since it was asked last

// Whether this thread has waited for one that did not run; forgets it.
inline bool was_late() { return std::exchange(waited_long, false); }

// Calls work(chunk) for chunks 0 to count - 1, each once, by whichever thread is free; returns when all are done.
template <class Work>
inline void share(Stage& stage, int count, const Work& work) {
  for (int chunk; (chunk = stage.taken.fetch_add(1, std::memory_order_relaxed)) < count;) {
    work(chunk);
    stage.done.fetch_add(1, std::memory_order_release);
  }
  Clock::time_point begin;
  int spin = 0;
  for (; stage.done.load(std::memory_order_acquire) < count; ++spin) {
    if (spin < SPINS) {
      _mm_pause();
      continue;
    }
    if (spin == SPINS) begin = Clock::now();
    sched_yield();
  }
  if (spin > SPINS && Clock::now() - begin > LONG_WAIT) waited_long = true;
}

// How the tiles of a weight are cut into chunks, which threads take.
struct Cut {
  const Linear& linear;
  int at_once, chunks;

  Cut(const Linear& linear, int threads) : linear(linear), at_once(2) {
    const int tiles = linear.outputs / TILE;
    for (int count : {4, 3})
      if (!(linear.tile_pairs && count == 3) && tiles % count == 0 && ((tiles / count) % threads == 0 || tiles > 16 * threads)) {
        at_once = count;
        break;
      }
    chunks = (tiles + at_once - 1) / at_once;
  }

  // Tiles of a chunk.
  int count(int chunk) const { return std::min(at_once, linear.outputs / TILE - chunk * at_once); }

  // The number of one of them.
  int tile(int chunk, int place) const {
    const int number = chunk * at_once + place;
    return linear.tile_pairs ? number / 2 + (number % 2 ? linear.outputs / TILE / 2 : 0) : number;
  }

  // Where they lie; past the last one, where that does.
  void find(int chunk, const char** to) const {
    const int last = count(chunk) - 1;
    for (int t = 0; t < CHUNK; ++t) to[t] = tile_of(linear, tile(chunk, std::min(t, last)));
  }
};

// The inputs of some tokens times the weight, shared among threads; `put` as above. `make_inputs` is called by each
// thread that has taken a chunk: as long as one is not done, nobody changes what inputs are made of. `next`, which may
// be null, is the weight that is read after this one.
template <class Make, class Put>
inline void multiply(const Linear& linear, const Linear* next, const Make& make_inputs, int tokens, Stage& stage, int threads, bool amx, const Put& put) {
  const Cut cut(linear, threads);
  const Inputs* inputs = nullptr;
  share(stage, cut.chunks, [&](int chunk) {
    if (!inputs) inputs = &make_inputs();
    const int count = cut.count(chunk), following = chunk + threads;  // most likely: threads take turns
    int numbers[CHUNK];
    const char* from[2 * CHUNK];
    for (int t = 0; t < count; ++t) numbers[t] = cut.tile(chunk, t);
    cut.find(chunk, from);
    if (following < cut.chunks || !next)
      cut.find(std::min(following, cut.chunks - 1), from + count);
    else if (const Cut other(*next, threads); following - cut.chunks < other.chunks)
      other.find(following - cut.chunks, from + count);
    multiply_tiles(linear, {numbers, from}, count, *inputs, tokens, amx, put);
  });
}

}  // namespace viasd
