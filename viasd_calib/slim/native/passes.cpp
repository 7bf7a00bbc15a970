// Passes of few tokens through the sublayers of a decoder on a CPU: all that a pass does beside its output head, in one
// call, with one team of threads. Called from Python through the functions at the end; every buffer is the caller's.
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <vector>

#include "attention.h"
#include "products.h"
#include "statistics.h"

using namespace viasd;

namespace {

constexpr int INPUT_BYTES = std::max<int>(2, sizeof(Number));  // of an input in all its planes, at most
constexpr int STAGES = 6;             // of a layer: products and attention steps that threads share
bool amx_allowed = false;

// Memory of a thread that lasts from call to call.
char* scratch(size_t bytes) {
  thread_local std::vector<char> memory;
  if (memory.size() < bytes + 64) memory.resize(bytes + 64);
  return (char*)((uintptr_t(memory.data()) + 63) & ~uintptr_t(63));
}

inline size_t whole(size_t bytes) { return (bytes + 63) & ~size_t(63); }

void norm(const float* row, const float* weight, int count, float epsilon, float* to) {
  Floats sum = all(0.0f);
  for (int i = 0; i < count; i += 16) {
    const Floats value = load(row + i);
    sum = fused(value, value, sum);
  }
  const Floats factor = all(1 / std::sqrt(sum_of(sum) / count + epsilon));
  for (int i = 0; i < count; i += 16) store(to + i, load(row + i) * factor * load(weight + i));
}

// Rotary embedding of one head (Su et al. 2021, arXiv 2104.09864, equation 34, with halves in place of pairs).
void rotate(float* head, const float* cosine, const float* sine, int width) {
  const int half = width / 2;
  for (int i = 0; i < half; i += 16) {
    const Floats a = load(head + i), b = load(head + i + half);
    const Floats low = b * load(sine + i), high = a * load(sine + i + half);
    store(head + i, fused_less(a, load(cosine + i), low));
    store(head + i + half, fused(b, load(cosine + i + half), high));
  }
}

Floats activated(Floats gate, int kind) {
  Floats inner = gate;  // silu: gate * sigmoid(gate)
  if (kind == 1) {      // gelu, by tanh: gate * sigmoid(2 sqrt(2 / pi) (gate + 0.044715 gate^3))
    const Floats cube = gate * gate * gate;
    inner = fused(cube, all(0.044715f), gate) * all(1.5957691216f);
  }
  return gate / (all(1.0f) + exponential(all(0.0f) - inner));
}

}  // namespace

extern "C" {

struct Layer {
  const float* attention_norm;  // [hidden]; null: the attention sublayer does not run
  const float* mlp_norm;        // the same of the MLP
  const float* query_norm;      // [head width], or null
  const float* key_norm;
  Linear qkv, out, gate_up, down;
  int32_t index;    // of its keys and values in the cache
  int32_t window;   // positions that a token reads, its own included; 0 for all
};

struct Model {
  int32_t hidden, heads, shared_heads, head_width, neurons;
  int32_t activation;  // 0 silu, 1 gelu by tanh
  float epsilon, scaling;
};

struct Cache {
  bfloat16* keys;        // [layers][texts][shared heads][capacity][head width], layers and texts at any distance
  bfloat16* values;
  int64_t layer_stride;  // numbers from one layer to the next
  int64_t text_stride;   // from one text to the next
  int64_t capacity;
};

// Neighbouring tokens of a text.
struct Text {
  int32_t number;  // of the text in the cache
  int32_t start;   // position of the first token
  int32_t width;   // tokens
};

}  // extern "C"

namespace {

// The first weight of a layer that is read; null where there is no such layer.
const Linear* first_of(const Layer* layers, int number, int count) {
  if (number == count) return nullptr;
  const Layer& layer = layers[number];
  return layer.attention_norm ? &layer.qkv : layer.mlp_norm ? &layer.gate_up : nullptr;
}

// Where a token stands.
struct Place {
  int text, position;
};

// Queries of a text's tokens that a thread takes at once, beside one head's keys: `count` of them from `first` on, of all
// rows' queries in order.
struct Queries {
  int text, first, count;
};

// What one thread reads inputs from, and how it makes them.
struct Own {
  float* row;     // [most inputs]
  Inputs inputs;
  float* scores;  // what attention works in

  static size_t bytes(int most, int rows, size_t attention) {
    return whole(most * 4) + whole(size_t(rows) * most * INPUT_BYTES) + whole(rows * 8) + whole(size_t(rows) * (most / GROUP) * 8) + whole(attention);
  }

  Own(int most, int rows, size_t attention) {
    char* memory = scratch(bytes(most, rows, attention));
    const auto take = [&](size_t size) { char* begin = memory; memory += whole(size); return begin; };
    row = (float*)take(most * 4);
    inputs = {take(size_t(rows) * most * INPUT_BYTES), (float*)take(rows * 8), (int32_t*)take(size_t(rows) * (most / GROUP) * 8)};
    scores = (float*)take(attention);
  }

  const Inputs& of(const Linear& linear, const float* from, int count, int rows, const float* weight, float epsilon) {
    for (int r = 0; r < rows; ++r) {
      const float* next = from + size_t(r) * count;
      if (weight) norm(next, weight, count, epsilon, row), next = row;
      put_token(linear, next, count, r, inputs);
    }
    return inputs;
  }
};

}  // namespace

extern "C" {

// Lets this process use AMX, or not: 1 where it does, which needs a CPU and a kernel of Linux that have it.
int viasd_use_amx(int wanted) {
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // arch_prctl's ARCH_REQ_XCOMP_PERM, and the tiles' state
  amx_allowed = AMX && wanted && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return amx_allowed;
}

// Runs `count` layers over tokens of some texts, `rows` in all; each text once. Returns whether a thread was waited for that
// did not run, as do the others that return something: other work has its core, and one thread less is faster.
//   stream  [rows][hidden], the residual stream, changed in place
//   cosine, sine  [rows][head width]
int viasd_run(const Model* model_, const Layer* layers, int count, const Cache* cache_, const Text* texts, int text_count,
               float* stream, const float* cosine, const float* sine, int threads) {
  const Model model = *model_;
  const Cache cache = *cache_;
  const int width = model.head_width, group = model.heads / model.shared_heads, hidden = model.hidden;
  const int queries = model.heads * width, keys = model.shared_heads * width, wide = queries + 2 * keys;
  const int most = int(whole(std::max({hidden, queries, model.neurons})));
  std::vector<Place> places;
  std::vector<Queries> taken;
  int length = 0;  // of the longest text
  for (const Text* text = texts; text < texts + text_count; ++text) {
    const int first = int(places.size()) * group, sharing = text->width * group;
    const int at_once = amx_allowed ? ROWS : queries_at_once(sharing * text_count, model.shared_heads, threads);
    for (int i = 0; i < sharing; i += at_once) taken.push_back({text->number, first + i, std::min(at_once, sharing - i)});
    for (int i = 0; i < text->width; ++i) places.push_back({text->number, text->start + i});
    length = std::max(length, text->start + text->width);
  }
  const int rows = int(places.size());
#ifdef __AMX_INT8__
  const size_t attention = std::max(attention_bytes(width, length), vector_attention_bytes(length));
#else
  const size_t attention = vector_attention_bytes(length);
#endif
  const size_t own_bytes = Own::bytes(most, rows, attention);
  std::vector<Stage> stages(size_t(count) * STAGES);
  // Of the team: in the calling thread's scratch, behind what it needs itself.
  char* shared = scratch(own_bytes + whole(size_t(rows) * wide * 4) + whole(size_t(rows) * std::max(queries, model.neurons) * 4)) + whole(own_bytes);
  float* qkv = (float*)shared;
  float* between = (float*)(shared + whole(size_t(rows) * wide * 4));  // of attention and its output, of gates and down
  std::atomic<bool> late{false};
  Clock::time_point done;  // the calling thread's own part
#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads();
    Own own(most, rows, attention);
    const auto add = [&](int row, const int* tiles, const Floats* values, int tile_count) {
      for (int t = 0; t < tile_count; ++t) {
        float* to = stream + size_t(row) * hidden + size_t(tiles[t]) * TILE;
        store(to, load(to) + values[t]);
      }
    };
    for (int n = 0; n < count; ++n) {
      const Layer& layer = layers[n];
      Stage* stage = stages.data() + size_t(n) * STAGES;
      if (layer.attention_norm) {
        const auto normed = [&]() -> const Inputs& { return own.of(layer.qkv, stream, hidden, rows, layer.attention_norm, model.epsilon); };
        multiply(layer.qkv, &layer.out, normed, rows, stage[0], team, amx_allowed, [&](int row, const int* tiles, const Floats* values, int tile_count) {
          for (int t = 0; t < tile_count; ++t) store(qkv + size_t(row) * wide + size_t(tiles[t]) * TILE, values[t]);
        });
        share(stage[1], rows * (model.shared_heads + model.heads), [&](int item) {
          const int row = item / (model.shared_heads + model.heads), head = item % (model.shared_heads + model.heads);
          float* from = qkv + size_t(row) * wide + size_t(head) * width;  // queries come first, then keys
          const bool key = head >= model.heads;
          const float* weight = key ? layer.key_norm : layer.query_norm;
          if (weight) norm(from, weight, width, model.epsilon, from);
          rotate(from, cosine + size_t(row) * width, sine + size_t(row) * width, width);
          if (!key) return;
          const size_t text = layer.index * cache.layer_stride + places[row].text * cache.text_stride;
          const size_t at = text + (size_t(head - model.heads) * cache.capacity + places[row].position) * width;
          for (int i = 0; i < width; i += 16) {
            narrow(cache.keys + at + i, load(from + i));
            narrow(cache.values + at + i, load(from + keys + i));
          }
        });
        share(stage[2], int(taken.size()) * model.shared_heads, [&](int item) {
          const int head = item % model.shared_heads;
          const auto [text, first, count] = taken[item / model.shared_heads];
          const size_t at = layer.index * cache.layer_stride + text * cache.text_stride + size_t(head) * cache.capacity * width;
          const Head cached = {cache.keys + at, cache.values + at, width, int(cache.capacity), model.scaling};
          const float* from[ROWS];
          float* to[ROWS];
          Span spans[ROWS];
          for (int i = 0; i < count; ++i) {  // queries of a token follow each other
            const int row = (first + i) / group, place = (head * group + (first + i) % group) * width;
            from[i] = qkv + size_t(row) * wide + place;
            to[i] = between + size_t(row) * queries + place;
            spans[i] = span_of(places[row].position, layer.window);
          }
#ifdef __AMX_INT8__
          if (amx_allowed) return attend_tiles(cached, count, from, spans, (char*)own.scores, to);
#endif
          attend(cached, count, from, spans, own.scores, to);
        });
        const auto attended = [&]() -> const Inputs& { return own.of(layer.out, between, queries, rows, nullptr, 0); };
        multiply(layer.out, layer.mlp_norm ? &layer.gate_up : nullptr, attended, rows, stage[3], team, amx_allowed, add);
      }
      if (layer.mlp_norm) {
        const int neurons = layer.gate_up.outputs / 2;
        const auto normed = [&]() -> const Inputs& { return own.of(layer.gate_up, stream, hidden, rows, layer.mlp_norm, model.epsilon); };
        multiply(layer.gate_up, &layer.down, normed, rows, stage[4], team, amx_allowed, [&](int row, const int* tiles, const Floats* values, int tile_count) {
          for (int t = 0; t < tile_count; t += 2)
            store(between + size_t(row) * neurons + size_t(tiles[t]) * TILE, activated(values[t], model.activation) * values[t + 1]);
        });
        const auto gated = [&]() -> const Inputs& { return own.of(layer.down, between, neurons, rows, nullptr, 0); };
        multiply(layer.down, first_of(layers, n + 1, count), gated, rows, stage[5], team, amx_allowed, add);
      }
    }
    forget_tiles();
    if (was_late()) late = true;
    if (omp_get_thread_num() == 0) done = Clock::now();
  }
  return rows <= ROWS && (late || Clock::now() - done > LONG_WAIT);
}

// A linear layer: from [rows][count] to [rows][columns], bfloat16 where `narrowed`, else float32; after a norm where
// `weight` is not null.
int viasd_linear(const Linear* linear, const float* from, int count, int rows, const float* weight, float epsilon, void* to, int narrowed, int columns, int threads) {
  const int most = linear->inputs;
  Stage stage;
  std::atomic<bool> late{false};
  Clock::time_point done;
#pragma omp parallel num_threads(threads)
  {
    Own own(most, rows, 0);
    const auto inputs = [&]() -> const Inputs& { return own.of(*linear, from, count, rows, weight, epsilon); };
    multiply(*linear, nullptr, inputs, rows, stage, omp_get_num_threads(), amx_allowed, [&](int row, const int* tiles, const Floats* values, int tile_count) {
      for (int t = 0; t < tile_count; ++t) {
        const int first = tiles[t] * TILE, here = std::min(TILE, columns - first);
        if (here <= 0) continue;
        const size_t at = size_t(row) * columns + first;
        if (narrowed) narrow_first(here, (bfloat16*)to + at, values[t]);
        else store_first(here, (float*)to + at, values[t]);
      }
    });
    forget_tiles();
    if (was_late()) late = true;
    if (omp_get_thread_num() == 0) done = Clock::now();
  }
  return rows <= ROWS && (late || Clock::now() - done > LONG_WAIT);
}

struct Drafter {
  Linear from_token, from_own, head;
  const bfloat16* embeddings;  // [vocabulary][hidden]
  const float* norm;           // before the head, [hidden]
  const float* ones;           // [hidden]
  float token_size, epsilon, own_epsilon;
};

// A step of a shallow drafter (draft/shallow.py) over `rows` tokens of a single text from position `start` on.
//   conditions  [rows][hidden], of each token
//   stream      [rows][hidden], left as the drafter's states
//   logits      of the last token
//   own         [rows - known][hidden], conditions for the places after the tokens from the `known`-th on
int viasd_draft(const Drafter* drafter, const Model* model, const Layer* layers, int count, const Cache* cache, int rows, int start,
                 const int64_t* ids, const bfloat16* conditions, int known, float* stream, const float* cosine, const float* sine,
                 bfloat16* logits, int vocabulary, bfloat16* own, int threads) {
  const int hidden = model->hidden;
  std::vector<float> tokens(size_t(rows) * hidden);
  const Floats size = all(drafter->token_size);
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < hidden; i += 16)
      store(&tokens[size_t(r) * hidden + i], widen(drafter->embeddings + ids[r] * hidden + i) / size);
  int late = viasd_linear(&drafter->from_token, tokens.data(), hidden, rows, nullptr, 0, stream, 0, hidden, threads);
  for (int i = 0; i < rows * hidden; i += 16) store(stream + i, load(stream + i) + widen(conditions + i));
  const Text text = {0, start, rows};
  late |= viasd_run(model, layers, count, cache, &text, 1, stream, cosine, sine, threads);
  const float* last = stream + size_t(rows - 1) * hidden;
  late |= viasd_linear(&drafter->head, last, hidden, 1, drafter->norm, drafter->epsilon, logits, 1, vocabulary, threads);
  const float* unverified = stream + size_t(known) * hidden;
  if (known < rows)
    late |= viasd_linear(&drafter->from_own, unverified, hidden, rows - known, drafter->ones, drafter->own_epsilon, own, 1, hidden, threads);
  return late;
}

// Statistics of rows of logits [rows][count]; of the proposed tokens [tokens], which may be none, the logit less the
// largest one.
//   values  [4][rows]: maximum, log_sum_exp, entropy, second;  argmax  [rows];  log_ratio  [tokens]
void viasd_statistics(const bfloat16* logits, int count, int rows, const int64_t* proposed, int tokens, float* values, int64_t* argmax, float* log_ratio, int threads) {
#pragma omp parallel for num_threads(std::min(threads, rows)) schedule(dynamic)
  for (int r = 0; r < rows; ++r) {
    const bfloat16* row = logits + size_t(r) * count;
    const Statistics found = statistics_of(row, count);
    const float four[] = {found.maximum, found.log_sum_exp, found.entropy, found.second};
    for (int i = 0; i < 4; ++i) values[size_t(i) * rows + r] = four[i];
    argmax[r] = found.argmax;
    if (r >= tokens) continue;
    const int64_t token = proposed[r];
    log_ratio[r] = token < 0 || token >= count ? NAN : logit_at(row, token) - found.maximum;
  }
}

// The largest logit of each row of [rows][count], NaN where one is no number, and the first place of it.
void viasd_largest(const bfloat16* logits, int count, int rows, int64_t* argmax, float* values) {
  for (int r = 0; r < rows; ++r) {
    const Largest found = largest_logit(logits + size_t(r) * count, count);
    argmax[r] = found.place;
    values[r] = found.is_number ? found.first : NAN;
  }
}

// The norm alone: from [rows][count] to bfloat16.
void viasd_norm(const float* from, int count, int rows, const float* weight, float epsilon, bfloat16* to) {
  float* row = (float*)scratch(size_t(count) * 4);
  for (int r = 0; r < rows; ++r) {
    norm(from + size_t(r) * count, weight, count, epsilon, row);
    for (int i = 0; i < count; i += 16) narrow(to + size_t(r) * count + i, load(row + i));
  }
}

}  // extern "C"
