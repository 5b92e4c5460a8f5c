// Neighborhood attention on a CPU, compiled on the user's machine and called through ctypes by native.py. No headers of
// PyTorch, no intrinsics: GCC's vector extensions, which Clang has too.
//
// A unit is one image, head and dilation group. Its keys and values are packed as float32, whatever the dtype: keys
// transposed, so that neighboring keys lie in the lanes of a vector. A tile is up to TILE queries whose windows lie in
// one span of keys. Bias and mask of a tile, expanded beforehand, are the start of its sums q . k; logits are in units
// of log 2. Two ways to tile:
//
//   by rows     queries next to each other in a row, against the rows of their windows, of which a ring is packed
//   by windows  queries that share a window (blocks, or dilation groups as large as the kernel), whose keys form a row
//
// Two loops do the work: `dots` (queries times transposed keys) and `mix` (coefficients times rows).

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <utility>
#include <vector>

#include <omp.h>

#ifndef __has_builtin  // GCC 9
#define __has_builtin(x) 0
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE = 16;
#elif defined(__AVX__)
constexpr int LANES = 8, TILE = 12;  // sums in 12 of 16 registers
#elif defined(__aarch64__)
constexpr int LANES = 4, TILE = 16;
#else
constexpr int LANES = 4, TILE = 12;
#endif
constexpr int CHUNK = 64;             // channels of a block of packed queries [TILE][CHUNK]
constexpr int ACROSS = 2;             // vectors of a row that `mix` takes at a time
constexpr int BLOCK = 4;              // rows of queries at a time, which share keys that are in the cache
constexpr int LOGITS = 1 << 16;       // most logits of a tile
constexpr int64_t WINDOWS = 1 << 20;  // most entries of an expanded bias by windows
constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.693147180559945309f;
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Short __attribute__((vector_size(2 * LANES)));
typedef float FloatAt __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t ShortAt __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const FloatAt*>(p); }
inline Vec load(const uint16_t* p) {  // bfloat16
  return reinterpret_cast<Vec>(__builtin_convertvector(Short(*reinterpret_cast<const ShortAt*>(p)), Bits) << 16);
}
inline void store(float* p, Vec x) { *reinterpret_cast<FloatAt*>(p) = x; }
inline void store(uint16_t* p, Vec x) {  // to the nearest, ties to even; NaN stays NaN
  const Bits bits = reinterpret_cast<Bits>(x), nan = reinterpret_cast<Bits>(x != x);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *reinterpret_cast<ShortAt*>(p) = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Short);
}

// Keeps x in a register: GCC would load it anew for each product, and loads are the bottleneck
inline Vec in_register(Vec x) {
#if defined(__AVX__)
  asm("" : "+v"(x));
#endif
  return x;
}

inline float number(float x) { return x; }
inline float number(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
using Lanes = std::make_integer_sequence<int, LANES>;
template <int W, int... I>
inline Vec swapped(Vec x, std::integer_sequence<int, I...>) {  // lane i holds lane i ^ W
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(x, x, (I ^ W)...);
#else
  return Vec{x[I ^ W]...};
#endif
}
template <int W = LANES / 2, class F>
inline Vec reduce(Vec x, F f) {  // in all lanes
  x = f(x, swapped<W>(x, Lanes{}));
  if constexpr (W > 1) x = reduce<W / 2>(x, f);
  return x;
}
inline Vec larger(Vec x, Vec y) { return x > y ? x : y; }
inline float total(Vec x) {
  return reduce(x, [](Vec a, Vec b) { return a + b; })[0];
}

// A bias in units of log 2; a finite one stays finite
inline float in_log2(float x) {
  constexpr float most = std::numeric_limits<float>::max();
  return std::isinf(x) ? x : std::max(-most, std::min(most, x * LOG2E));
}

// 2^x for x <= 0, to 1e-7; exactly 0 below -127; NaN stays NaN
inline Vec exp2(Vec x) {
  const Vec least = Vec{} - 127.0f;
  x = x < least ? least : x;
  const Vec shifted = x + 12583039.0f;  // 1.5 * 2^23 + 127: the lowest bits become the biased exponent
  const Vec r = x - (shifted - 12583039.0f);
  Vec y = r * 0.0001545316294f + 0.001339086336f;
  y = y * r + 0.009618082557f;
  y = y * r + 0.05550357114f;
  y = y * r + 0.2402265076f;
  y = y * r + 0.693147188f;
  y = y * r + 1.0f;
  return y * reinterpret_cast<Vec>(reinterpret_cast<Bits>(shifted) << 23);
}

// ------------------------------------------------------------------------------------------------ the two loops

// out[t] = start[t] + add[t] + sum_d q[t][d] keys[d], LANES keys; q in blocks [TILE][CHUNK]
template <int T>
void dots_of(const float* q, int depth, const float* keys, int64_t stride, const float* start, int64_t start_apart,
             const float* add, int64_t add_apart, float* out, int64_t out_apart) {
  Vec sum[T];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) sum[t] = start ? load(start + t * start_apart) : Vec{};
  if (add) {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) sum[t] += add[t * add_apart];
  }
  for (int from = 0; from < depth; from += CHUNK, q += TILE * CHUNK) {
    const int count = std::min(CHUNK, depth - from);
    for (int d = 0; d < count; ++d, keys += stride) {
      const Vec x = load(keys);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) sum[t] += q[t * CHUNK + d] * x;
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) store(out + t * out_apart, sum[t]);
}

using Dots = void (*)(const float*, int, const float*, int64_t, const float*, int64_t, const float*, int64_t, float*,
                      int64_t);
template <int... I>
constexpr std::array<Dots, sizeof...(I)> dots_table(std::integer_sequence<int, I...>) {
  return {{dots_of<I + 1>...}};
}
constexpr auto dots = dots_table(std::make_integer_sequence<int, TILE>{});  // [queries - 1]

// out[a] (+)= sum over rows and n of coefficient[row * by_row + a * by_a + n * by_n] x[row][n], C vectors; rows without
// x are left out
template <int A, int C>
void mix_of(const float* const* x, int rows, int64_t offset, int64_t apart, int count, const float* coefficient,
            int64_t by_row, int64_t by_a, int64_t by_n, bool onto, float* out, int64_t out_apart) {
  Vec sum[A][C];
#pragma GCC unroll 8
  for (int a = 0; a < A; ++a)
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) sum[a][c] = onto ? load(out + a * out_apart + c * LANES) : Vec{};
  for (int r = 0; r < rows; ++r, coefficient += by_row) {
    if (!x[r]) continue;
    const float *y = x[r] + offset, *k = coefficient;
    for (int n = 0; n < count; ++n, y += apart, k += by_n) {
      Vec z[C];
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) z[c] = in_register(load(y + c * LANES));
#pragma GCC unroll 8
      for (int a = 0; a < A; ++a)
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) sum[a][c] += k[a * by_a] * z[c];
    }
  }
#pragma GCC unroll 8
  for (int a = 0; a < A; ++a)
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) store(out + a * out_apart + c * LANES, sum[a][c]);
}

using Mix = void (*)(const float* const*, int, int64_t, int64_t, int, const float*, int64_t, int64_t, int64_t, bool,
                     float*, int64_t);
constexpr Mix mixes[6][2] = {{mix_of<1, 1>, mix_of<1, 2>}, {mix_of<2, 1>, mix_of<2, 2>}, {mix_of<3, 1>, mix_of<3, 2>},
                             {mix_of<4, 1>, mix_of<4, 2>}, {mix_of<5, 1>, mix_of<5, 2>}, {mix_of<6, 1>, mix_of<6, 2>}};

// ------------------------------------------------------------------------------------------------------- memory

inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

struct Buffer {  // uninitialised floats, aligned to a vector
  std::vector<float> held;
  float* get(size_t count) {
    if (held.size() < count + 16) held.resize(count + 16);
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(held.data()) + 63) & ~uintptr_t(63));
  }
};

// x[i], a vector of channels from key i, becomes a vector of keys from channel i
#if __has_builtin(__builtin_shufflevector)
template <int W, int... I>
inline void swap_halves(Vec& a, Vec& b, std::integer_sequence<int, I...>) {
  const Vec low = __builtin_shufflevector(a, b, ((I & W) ? LANES + (I ^ W) : I)...);
  b = __builtin_shufflevector(a, b, ((I & W) ? LANES + I : (I ^ W))...);
  a = low;
}
template <int W>
inline void transpose_by(Vec* x) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i)
    if (!(i & W)) swap_halves<W>(x[i], x[i | W], Lanes{});
}
inline void transpose(Vec* x) {
  transpose_by<1>(x);
  transpose_by<2>(x);
  if constexpr (LANES > 4) transpose_by<4>(x);
  if constexpr (LANES > 8) transpose_by<8>(x);
}
#else
inline void transpose(Vec* x) {
  float at[LANES][LANES], to[LANES][LANES];
  std::memcpy(at, x, sizeof at);
  for (int i = 0; i < LANES; ++i)
    for (int j = 0; j < LANES; ++j) to[j][i] = at[i][j];
  std::memcpy(x, to, sizeof to);
}
#endif

// Rows of `depth` channels at `from`, null for zeros, as [depth][stride]; `count` and `stride` are multiples of LANES
template <class E>
void pack_transposed(const E* const* from, int64_t count, int64_t depth, float* to, int64_t stride) {
  for (int64_t key = 0; key < count; key += LANES, from += LANES) {
    int64_t d = 0;
    for (; d + LANES <= depth; d += LANES) {
      Vec x[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) x[i] = from[i] ? load(from[i] + d) : Vec{};
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) store(to + (d + i) * stride + key, x[i]);
    }
    for (; d < depth; ++d)
      for (int i = 0; i < LANES; ++i) to[d * stride + key + i] = from[i] ? number(from[i][d]) : 0.0f;
  }
}

template <class E>
inline void copy_row(const E* from, int64_t depth, float factor, float* to, int64_t width) {
  int64_t d = 0;
  for (; d + LANES <= depth; d += LANES) store(to + d, load(from + d) * factor);
  for (; d < depth; ++d) to[d] = number(from[d]) * factor;
  for (; d < width; ++d) to[d] = 0.0f;
}

// The same as [count][width]
template <class E>
void pack_rows(const E* const* from, int64_t count, int64_t depth, float* to, int64_t width) {
  for (int64_t i = 0; i < count; ++i, to += width) {
    if (from[i])
      copy_row(from[i], depth, 1.0f, to, width);
    else
      std::fill(to, to + width, 0.0f);
  }
}

template <class E>
inline void write_row(const float* from, int64_t depth, float factor, E* to) {
  int64_t d = 0;
  for (; d + LANES <= depth; d += LANES) store(to + d, load(from + d) * factor);
  if (d == depth) return;
  E rest[LANES];
  store(rest, load(from + d) * factor);  // `from` is padded to whole vectors
  std::copy(rest, rest + (depth - d), to + d);
}

// --------------------------------------------------------------------------------------------------- the plan

struct Strides {
  int64_t image, row, column, head;
};

extern "C" struct Call {  // mirrored by native.Call
  int64_t batch, heads, depth, value_depth, height, width, rows, columns, dilation[2], kernel[2];
  int64_t bias;    // 0 none, 1 table, 2 decomposed
  int64_t masked;  // keys outside of the map are left out; otherwise they are zeros
  int64_t half;    // bfloat16, otherwise float32
  int64_t threads, first_by_head, second_by_head;
  double scale;
  const void *q, *k, *v, *grad;
  Strides at_q, at_k, at_v, at_grad, at_out, at_dq, at_dk, at_dv;
  const float *first, *second;              // table, or embeddings of rows and columns
  const int32_t *row_start, *row_base;      // first key of each query row's window, table row of key 0
  const int32_t *column_start, *column_base;
  void *out, *dq, *dk, *dv;
  float *dfirst, *dsecond;
};

struct Axis {  // of keys and queries, by dilation group
  int64_t length, all, dilation, kernel;
  const int32_t *starts, *bases;
  bool masked;

  int keys(int group) const { return int((length - group + dilation - 1) / dilation); }
  int queries(int group) const { return int((all - group + dilation - 1) / dilation); }
  int base(int group, int query) const { return bases[query * dilation + group]; }
  int low(int group, int query) const {
    const int start = starts[query * dilation + group];
    return masked ? std::max(start, 0) : start;
  }
  int high(int group, int query) const {
    const int end = starts[query * dilation + group] + int(kernel);
    return masked ? std::min(end, keys(group)) : end;
  }
};

struct Tile {  // `count` queries, keys from `key` on
  int first, count, key, vectors, pattern;
};
struct Columns {  // the tiles of one dilation group, and the keys that they read
  std::vector<Tile> tiles;
  int from = 0, width = 0;
};
struct Pattern {  // by query of the tile: keys of its window, and the table's column of the tile's first key
  int vectors;
  std::vector<int> low, high, base;
  int64_t at = 0;  // in the expanded bias of a head: [rows of the table][count][vectors]
};
struct Run {  // queries that share a window
  int first, count, key, keys, pattern;
};
struct Relative {  // keys of a run, and by query the table's index of the first
  int keys;
  std::vector<int> index;
};

struct Plan {
  const Call& call;
  Axis axes[2];
  bool windows = false;
  int table_rows;                          // 1 without a table
  std::vector<Columns> columns;            // by rows
  std::vector<Pattern> patterns;
  std::vector<std::vector<Run>> runs[2];   // by windows: of each dilation group
  std::vector<Relative> relative[2];
  std::vector<int64_t> window_at;          // [relative of rows][relative of columns]
  int64_t bias_size = 0;                   // of a head

  explicit Plan(const Call& c) : call(c) {
    axes[0] = {c.height, c.rows, c.dilation[0], c.kernel[0], c.row_start, c.row_base, c.masked != 0};
    axes[1] = {c.width, c.columns, c.dilation[1], c.kernel[1], c.column_start, c.column_base, c.masked != 0};
    table_rows = c.bias == 1 ? int(2 * c.kernel[0] - 1) : 1;
    const int least = int((c.kernel[1] + LANES - 1) / LANES);
    int best = least;
    double cost = std::numeric_limits<double>::infinity();
    for (int cap = least; cap < least + 4; ++cap) {
      double each = 0;
      for (const Tile& t : tile(0, cap)) each += t.vectors * std::max(t.count, 8);  // below 8 sums, latency counts
      if (each < cost) cost = each, best = cap;
    }
    if (c.bias != 2 && plan_windows(cost)) return;
    for (int g = 0; g < c.dilation[1]; ++g) add_columns(g, best);
  }

  std::vector<Tile> tile(int group, int cap) const {
    std::vector<Tile> tiles;
    const Axis& a = axes[1];
    const int queries = a.queries(group);
    for (int first = 0; first < queries;) {
      const int key = a.low(group, first);
      int count = 0, vectors = 1;
      for (; first + count < queries && count < TILE; ++count) {
        const int needed = (a.high(group, first + count) - key + LANES - 1) / LANES;
        const bool large = (count + 1) * int64_t(axes[0].kernel) * needed * LANES > LOGITS;
        if (count && (needed > std::max(cap, vectors) || large)) break;
        vectors = std::max(vectors, needed);
      }
      tiles.push_back({first, count, key, vectors, 0});
      first += count;
    }
    return tiles;
  }

  void add_columns(int group, int cap) {
    const Axis& a = axes[1];
    Columns found;
    found.tiles = tile(group, cap);
    int low = 0, high = 0;
    for (Tile& t : found.tiles) {
      Pattern p{t.vectors, {}, {}, {}};
      for (int j = t.first; j < t.first + t.count; ++j) {
        p.low.push_back(a.low(group, j) - t.key);
        p.high.push_back(a.high(group, j) - t.key);
        p.base.push_back(a.base(group, j) + t.key);
      }
      t.pattern = -1;
      for (size_t i = 0; i < patterns.size(); ++i) {
        const Pattern& o = patterns[i];
        if (o.vectors == p.vectors && o.low == p.low && o.high == p.high && o.base == p.base) t.pattern = int(i);
      }
      if (t.pattern < 0) {
        t.pattern = int(patterns.size());
        p.at = bias_size;
        bias_size += int64_t(table_rows) * t.count * t.vectors * LANES;
        patterns.push_back(p);
      }
      low = &t == &found.tiles[0] ? t.key : std::min(low, t.key);
      high = std::max(high, t.key + t.vectors * LANES);
    }
    found.from = low;
    found.width = int(padded(high - low));
    columns.push_back(found);
  }

  // Whether windows are disjoint and cheaper, in products of a vector with a query; packing a key costs about 3
  bool plan_windows(double columns_cost) {
    for (int side = 0; side < 2; ++side)
      for (int g = 0; g < axes[side].dilation; ++g)
        if (!add_runs(side, g)) return false;
    double by_windows = 0, by_rows = 0, keys = 0;
    for (const Run& r : runs[0][0]) {
      by_rows += double(r.count) * r.keys * columns_cost;
      keys += r.keys;
      for (const Run& c : runs[1][0])
        by_windows += double(r.count) * c.count * (padded(r.keys * c.keys) / LANES) + 3.0 * r.keys * c.keys;
    }
    if (by_windows >= by_rows + 3.0 * keys * axes[1].length / axes[1].dilation) return false;
    int64_t size = 0;
    for (const Relative& r : relative[0])
      for (const Relative& c : relative[1]) {
        window_at.push_back(size);
        size += (call.bias == 1 ? r.index.size() * c.index.size() : 1) * padded(r.keys * c.keys);
      }
    if (size > WINDOWS) return window_at.clear(), false;
    bias_size = size;
    return windows = true;
  }

  bool add_runs(int side, int group) {
    const Axis& a = axes[side];
    runs[side].emplace_back();
    auto& found = runs[side].back();
    for (int j = 0; j < a.queries(group);) {
      Run run{j, 0, a.low(group, j), a.high(group, j) - a.low(group, j), 0};
      if (!found.empty() && found.back().key + found.back().keys > run.key) return false;
      Relative relation{run.keys, {}};
      const int end = run.key + run.keys;
      for (; j < a.queries(group) && a.low(group, j) == run.key && a.high(group, j) == end; ++j, ++run.count)
        relation.index.push_back(a.base(group, j) + run.key);
      auto& known = relative[side];
      for (run.pattern = 0; run.pattern < int(known.size()); ++run.pattern)
        if (known[run.pattern].keys == run.keys && known[run.pattern].index == relation.index) break;
      if (run.pattern == int(known.size())) known.push_back(relation);
      found.push_back(run);
    }
    return true;
  }

  // Calls f(place in the expanded bias of a head, count, place in its table) for all entries that are seen
  template <class F>
  void visit(F f) const {
    const int64_t across = 2 * axes[1].kernel - 1;
    for (const Pattern& p : patterns)
      for (int row = 0; row < table_rows; ++row)
        for (size_t t = 0; t < p.low.size(); ++t)
          f(p.at + (int64_t(row) * p.low.size() + t) * p.vectors * LANES + p.low[t], p.high[t] - p.low[t],
            row * across + p.base[t] + p.low[t]);
    for (size_t i = 0; i < window_at.size(); ++i) {
      const Relative &r = relative[0][i / relative[1].size()], &c = relative[1][i % relative[1].size()];
      const size_t queries = call.bias == 1 ? r.index.size() * c.index.size() : 1;
      for (size_t q = 0; q < queries; ++q)
        for (int y = 0; y < r.keys; ++y)
          f(window_at[i] + q * padded(r.keys * c.keys) + y * c.keys, c.keys,
            (r.index[q / c.index.size()] + y) * across + c.index[q % c.index.size()]);
    }
  }

  void expand(int64_t head, float* to) const {
    const float* table = call.bias == 1 ? call.first + head * call.first_by_head : nullptr;
    std::fill(to, to + bias_size, LOWEST);
    visit([&](int64_t at, int count, int64_t entry) {
      for (int i = 0; i < count; ++i) to[at + i] = table ? in_log2(table[entry + i]) : 0.0f;
    });
  }

  void fold(const float* from, float* table) const {
    visit([&](int64_t at, int count, int64_t entry) {
      for (int i = 0; i < count; ++i) table[entry + i] += from[at + i];
    });
  }
};

// ------------------------------------------------------------------------------------------------------- a tile

inline int64_t blocks(int64_t channels) { return (channels + CHUNK - 1) / CHUNK; }

struct Ring {  // rows of a map, in slots
  Buffer held;
  int slots = 0;
  int64_t size = 0;
  void resize(int s, int64_t n) { slots = s, size = n, held.get(s * n); }
  float* row(int r) { return held.get(0) + r % slots * size; }
};

struct Side {  // the embedding of rows or columns, between margins into which tiles reach
  Buffer columns, rows_, grad;  // by channel, in units of log 2; as they are; of all heads
  int64_t margin = 0, rows = 0;
};

inline float* clear(Buffer& buffer, int64_t count) {
  float* p = buffer.get(count);
  std::fill(p, p + count, 0.0f);
  return p;
}

template <class E>
struct Worker {  // one thread's memory, and the tile that it is at
  const Plan& plan;
  const Call& c;
  const float* bias;  // expanded, of all heads
  const bool backward;
  const int64_t depth, value_depth, dp, vp;  // channels, and padded to whole vectors
  int64_t image = 0, head = 0;

  int count = 0, rows = 0, vectors = 0, widest = 4;  // queries, rows of keys, vectors of a row; rows of a `mix`
  int next_row = 0;                                  // of keys, to be packed
  int y[TILE], x[TILE], low[TILE], high[TILE], base[TILE], table_row = 0;
  int64_t stride = 0, start_apart = 0;                                      // of transposed keys; of starts by query
  std::vector<const float*> keys, values, starts, key_rows, value_columns;  // by row; null outside of the map
  std::vector<float*> dkeys, dvalues;
  float inverse[TILE];

  Buffer queries, raw, grad, logits, logit_grad, out, by_row, by_column;
  Ring rings[6];      // of rows: transposed keys, values; backward: keys, transposed values, dk, dv
  Side sides[2];      // of a decomposed bias
  Buffer table_grad;  // expanded, of all heads
  std::vector<const E*> from;
  std::vector<E*> to;

  Worker(const Plan& p, const float* b, bool back)
      : plan(p), c(p.call), bias(b), backward(back), depth(c.depth), value_depth(c.value_depth), dp(padded(c.depth)),
        vp(padded(c.value_depth)) {
    if (c.bias == 2) {
      sides[0].margin = padded(c.kernel[0]) + LANES;
      for (const Pattern& pattern : p.patterns)
        sides[1].margin = std::max<int64_t>(sides[1].margin, pattern.vectors * LANES);
      for (int side = 0; side < 2; ++side) {
        sides[side].rows = 2 * c.kernel[side] - 1 + 2 * sides[side].margin;
        if (backward) clear(sides[side].grad, c.heads * sides[side].rows * dp);
      }
    }
    if (backward && c.bias == 1) clear(table_grad, c.heads * plan.bias_size);
  }

  template <class P>
  P* at_query(P* first, const Strides& at, int t) const {
    return first + image * at.image + y[t] * at.row + x[t] * at.column + head * at.head;
  }

  // Channels of the queries, in blocks [TILE][CHUNK] padded with zeros
  float* pack_queries(Buffer& to, const void* first, const Strides& at, int64_t channels, float factor) {
    float* packed = to.get(blocks(channels) * TILE * CHUNK);
    for (int t = 0; t < count; ++t) {
      const E* row = at_query(static_cast<const E*>(first), at, t);
      for (int64_t d = 0; d < channels; d += CHUNK) {
        const int64_t n = std::min<int64_t>(CHUNK, channels - d);
        copy_row(row + d, n, factor, packed + d * TILE + t * CHUNK, padded(n));
      }
    }
    return packed;
  }

  int64_t apart() const { return int64_t(rows) * vectors * LANES; }

  // softmax(q k + bias) without its denominators, [count][rows][vectors]
  float* weights(const float* q) {
    const float* add = c.bias == 2 ? decomposed() : nullptr;
    float* p = logits.get(count * apart());
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < vectors; ++i)
        dots[count - 1](q, keys[r] ? int(depth) : 0, keys[r] + (keys[r] ? i * LANES : 0), stride,
                        starts[r] + i * LANES, start_apart, add ? add + r : nullptr, padded(rows),
                        p + (r * vectors + i) * LANES, apart());
    const int n = rows * vectors;
    for (int t = 0; t < count; ++t) {
      float* row = p + t * apart();
      Vec top = load(row);
      for (int i = 1; i < n; ++i) top = larger(load(row + i * LANES), top);
      const Vec most = reduce(top, larger);
      Vec sum = {};
      for (int i = 0; i < n; ++i) {
        const Vec z = exp2(load(row + i * LANES) - most);
        store(row + i * LANES, z);
        sum += z;
      }
      inverse[t] = 1.0f / total(sum);
    }
    return p;
  }

  // out[t] = sum of coefficient[t][row][key] of[row][key] over the keys that t sees, rows of `width` channels
  void mix_keys(const float* coefficient, const std::vector<const float*>& of, int64_t width, float* to) {
    const int parts = (count + widest - 1) / widest;
    for (int part = 0; part < parts; ++part) {
      const int a = count * part / parts, n = count * (part + 1) / parts - a;
      const int first = low[a], last = high[a + n - 1];  // windows begin and end in the order of the queries
      for (int64_t d = 0; d < width; d += ACROSS * LANES)
        mixes[n - 1][width - d > LANES](of.data(), rows, first * width + d, width, last - first,
                                        coefficient + a * apart() + first, vectors * LANES, apart(), 1, false,
                                        to + a * width + d, width);
    }
  }

  // to[row][key] += sum of coefficient[t][row][key] q[t] over the queries that see the key
  void mix_queries(const float* coefficient, const float* q, int64_t width, const std::vector<float*>& to) {
    const int first = low[0], last = high[count - 1];
    for (int r = 0; r < rows; ++r) {
      if (!to[r]) continue;
      for (int key = first; key < last; key += widest) {
        const int n = std::min(widest, last - key);
        int begin = 0, end = count;
        while (begin < end && high[begin] <= key) ++begin;
        while (end > begin && low[end - 1] >= key + n) --end;
        const float* k = coefficient + begin * apart() + r * vectors * LANES + key;
        for (int64_t d = 0; d < width; d += ACROSS * LANES) {
          const float* channels = q + d / CHUNK * TILE * CHUNK + d % CHUNK;
          mixes[n - 1][width - d > LANES](&channels, 1, begin * CHUNK, CHUNK, end - begin, k, 0, 1, apart(), true,
                                          to[r] + key * width + d, width);
        }
      }
    }
  }

  void forward() {
    const float* p = weights(pack_queries(queries, c.q, c.at_q, depth, float(c.scale) * LOG2E));
    float* o = out.get(count * vp);
    mix_keys(p, values, vp, o);
    for (int t = 0; t < count; ++t)
      write_row(o + t * vp, value_depth, inverse[t], at_query(static_cast<E*>(c.out), c.at_out, t));
  }

  void backward_tile() {
    const float* q = pack_queries(queries, c.q, c.at_q, depth, float(c.scale) * LOG2E);
    float* p = weights(q);
    const float* g = pack_queries(grad, c.grad, c.at_grad, value_depth, 1.0f);
    float* d = logit_grad.get(count * apart());
    const int n = rows * vectors;
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < vectors; ++i)
        dots[count - 1](g, value_columns[r] ? int(value_depth) : 0, value_columns[r] ? value_columns[r] + i * LANES : g,
                        stride, nullptr, 0, nullptr, 0, d + (r * vectors + i) * LANES, apart());
    for (int t = 0; t < count; ++t) {
      float *weight = p + t * apart(), *change = d + t * apart();
      Vec sum = {};
      for (int i = 0; i < n; ++i) sum += load(weight + i * LANES) * load(change + i * LANES);
      const float mean = total(sum) * inverse[t];
      for (int i = 0; i < n; ++i) {
        const Vec w = load(weight + i * LANES) * inverse[t];
        store(weight + i * LANES, w);
        store(change + i * LANES, w * (load(change + i * LANES) - mean));
      }
    }
    if (c.bias == 1 && c.dfirst)
      for (int r = 0; r < rows; ++r)
        for (int t = 0; t < count; ++t) {
          float* sum = table_grad.get(0) + (starts[r] - bias) + t * start_apart;
          const float* change = d + t * apart() + r * vectors * LANES;
          for (int i = 0; i < vectors * LANES; i += LANES) store(sum + i, load(sum + i) + load(change + i));
        }
    float* o = out.get(count * dp);
    mix_keys(d, key_rows, dp, o);
    for (int64_t i = 0; i < count * dp; ++i) o[i] *= float(c.scale);
    if (c.bias == 2) decomposed_backward(d, o);
    for (int t = 0; t < count; ++t) write_row(o + t * dp, depth, 1.0f, at_query(static_cast<E*>(c.dq), c.at_dq, t));
    mix_queries(p, g, vp, dvalues);
    mix_queries(d, q, dp, dkeys);  // q is in units of scale * log2(e)
  }

  // ------------------------------------------------------------------------------------------- decomposed bias

  void pack_sides() {
    for (int side = 0; side < 2; ++side) {
      Side& s = sides[side];
      const float* e = side ? c.second + head * c.second_by_head : c.first + head * c.first_by_head;
      float *columns = clear(s.columns, depth * s.rows), *embeddings = clear(s.rows_, s.rows * dp);
      for (int64_t i = 0; i < 2 * c.kernel[side] - 1; ++i)
        for (int64_t d = 0; d < depth; ++d) {
          columns[d * s.rows + s.margin + i] = e[i * depth + d] * LOG2E;
          embeddings[(s.margin + i) * dp + d] = e[i * depth + d];
        }
    }
  }

  // Starts the sums of each query with the bias of the key's column; returns that of the row, [count][padded(rows)]
  const float* decomposed() {
    const float* q = pack_queries(raw, c.q, c.at_q, depth, 1.0f);
    const int64_t across = padded(rows), width = int64_t(vectors) * LANES;
    float *r = by_row.get(count * across), *k = by_column.get(count * width);
    const float* e = sides[0].columns.get(0) + sides[0].margin + table_row;
    const float* f = sides[1].columns.get(0) + sides[1].margin;
    for (int64_t i = 0; i < across; i += LANES)
      dots[count - 1](q, int(depth), e + i, sides[0].rows, nullptr, 0, nullptr, 0, r + i, across);
    for (int t = 0; t < count; ++t)
      for (int64_t i = 0; i < width; i += LANES)
        dots[0](q + t * CHUNK, int(depth), f + base[t] + i, sides[1].rows, starts[0] + t * start_apart + i, 0, nullptr,
                0, k + t * width + i, 0);
    std::fill(starts.begin(), starts.begin() + rows, k);
    start_apart = width;
    return r;
  }

  // Adds the gradient of the logits through the bias to that of the queries, `o`, and to those of the embeddings
  void decomposed_backward(const float* d, float* o) {
    const int64_t across = padded(rows), width = int64_t(vectors) * LANES;
    float *r = clear(by_row, count * across), *k = clear(by_column, count * width);
    for (int t = 0; t < count; ++t)
      for (int row = 0; row < rows; ++row) {
        Vec sum = {};
        for (int i = 0; i < vectors; ++i) {
          const Vec change = load(d + t * apart() + (row * vectors + i) * LANES);
          store(k + t * width + i * LANES, load(k + t * width + i * LANES) + change);
          sum += change;
        }
        r[t * across + row] = total(sum);
      }
    const int64_t row_at = (sides[0].margin + table_row) * dp;
    float *row_grad = sides[0].grad.get(0) + head * sides[0].rows * dp + row_at;
    float *column_grad = sides[1].grad.get(0) + head * sides[1].rows * dp;
    for (int64_t from_d = 0; from_d < dp; from_d += ACROSS * LANES) {
      const int wide = dp - from_d > LANES;
      const float* q = raw.get(0) + from_d / CHUNK * TILE * CHUNK + from_d % CHUNK;
      const float* rows_of = sides[0].rows_.get(0) + row_at;
      for (int row = 0; row < rows; ++row)
        mixes[0][wide](&q, 1, 0, CHUNK, count, r + row, 0, 0, across, true, row_grad + row * dp + from_d, 0);
      for (int t = 0; t < count; ++t) {
        const int64_t column_at = (sides[1].margin + base[t] + low[t]) * dp;
        const float *columns_of = sides[1].rows_.get(0) + column_at, *query = q + t * CHUNK;
        mixes[0][wide](&rows_of, 1, from_d, dp, rows, r + t * across, 0, 0, 1, true, o + t * dp + from_d, 0);
        mixes[0][wide](&columns_of, 1, from_d, dp, high[t] - low[t], k + t * width + low[t], 0, 0, 1, true,
                       o + t * dp + from_d, 0);
        for (int i = low[t]; i < high[t]; ++i)
          mixes[0][wide](&query, 1, 0, 0, 1, k + t * width + i, 0, 0, 0, true,
                         column_grad + column_at + (i - low[t]) * dp + from_d, 0);
      }
    }
  }

  // ------------------------------------------------------------------------------------- by rows and by windows

  // Brings a query, or the values or keys at a place of the map, into the cache: their lines are far apart
  template <class P>
  void prefetch(const P* first, const Strides& at, int row, int column, int64_t channels) const {
    const P* p = first + image * at.image + row * at.row + column * at.column + head * at.head;
    for (int64_t d = 0; d < channels; d += 64 / int64_t(sizeof(P))) __builtin_prefetch(p + d);
  }

  // Where keys of a row of the map are, null outside; `first` is k, v or a gradient
  template <class P>
  void locate(P* first, const Strides& at, int gr, int gc, int row, int key, int n, std::vector<P*>& found) const {
    const int length = plan.axes[0].keys(gr), across = plan.axes[1].keys(gc);
    P* line = first + image * at.image + (row * c.dilation[0] + gr) * at.row + gc * at.column + head * at.head;
    for (int i = key; i < key + n; ++i)
      found.push_back(row >= 0 && row < length && i >= 0 && i < across ? line + i * c.dilation[1] * at.column : 0);
  }

  // Packs the keys and values at `find`, as one row
  template <class F>
  void pack(int row, F find) {
    from.clear(), find(static_cast<const E*>(c.k), c.at_k, from), from.resize(stride, nullptr);
    pack_transposed(from.data(), stride, depth, rings[0].row(row), stride);
    if (backward) pack_rows(from.data(), stride, depth, rings[2].row(row), dp);
    from.clear(), find(static_cast<const E*>(c.v), c.at_v, from), from.resize(stride, nullptr);
    pack_rows(from.data(), stride, value_depth, rings[1].row(row), vp);
    if (!backward) return;
    pack_transposed(from.data(), stride, value_depth, rings[3].row(row), stride);
    for (int i = 4; i < 6; ++i) std::fill(rings[i].row(row), rings[i].row(row) + rings[i].size, 0.0f);
  }

  template <class F>
  void write_gradients(int row, F find) {
    to.clear(), find(static_cast<E*>(c.dk), c.at_dk, to);
    for (size_t i = 0; i < to.size(); ++i)
      if (to[i]) write_row(rings[4].row(row) + i * dp, depth, LN2, to[i]);
    to.clear(), find(static_cast<E*>(c.dv), c.at_dv, to);
    for (size_t i = 0; i < to.size(); ++i)
      if (to[i]) write_row(rings[5].row(row) + i * vp, value_depth, 1.0f, to[i]);
  }

  void resize_rings(int slots) {
    const int64_t sizes[6] = {stride * depth, stride * vp, stride * dp, stride * value_depth, stride * dp, stride * vp};
    for (int i = 0; i < (backward ? 6 : 2); ++i) rings[i].resize(slots, sizes[i]);
  }

  void resize_rows(int n) {
    rows = n;
    for (auto* v : {&keys, &values, &starts, &key_rows, &value_columns}) v->resize(n);
    for (auto* v : {&dkeys, &dvalues}) v->resize(n);
  }

  // Row r of the tile is the packed `row`, from `key` on; or, outside of the map, none
  void set_row(int r, bool inside, int row, int key) {
    keys[r] = inside ? rings[0].row(row) + key : nullptr;
    values[r] = inside ? rings[1].row(row) + key * vp : nullptr;
    if (!backward) return;
    key_rows[r] = inside ? rings[2].row(row) + key * dp : nullptr;
    value_columns[r] = inside ? rings[3].row(row) + key : nullptr;
    dkeys[r] = inside ? rings[4].row(row) + key * dp : nullptr;
    dvalues[r] = inside ? rings[5].row(row) + key * vp : nullptr;
  }

  const float* head_bias() const { return bias + (c.bias == 1 ? head * plan.bias_size : 0); }

  void by_rows(int gr, int gc, int begin, int end) {
    const Columns& columns = plan.columns[gc];
    const Axis& a = plan.axes[0];
    if (begin >= end || columns.tiles.empty()) return;
    if (c.bias == 2) pack_sides();
    stride = columns.width;
    int slots = 0;
    for (int i = begin; i < end; ++i) slots = std::max(slots, a.high(gr, std::min(i + BLOCK, end) - 1) - a.low(gr, i));
    resize_rings(slots);
    auto keys_of = [&](int row) {
      return [&, row](auto* first, const Strides& at, auto& found) {
        locate(first, at, gr, gc, row, columns.from, columns.width, found);
      };
    };
    const int length = a.keys(gr);
    int next = std::max(a.low(gr, begin), 0), done = next;  // rows packed, and rows whose gradients are complete
    for (int i = begin; i < end; i += BLOCK) {
      const int stop = std::min(i + BLOCK, end), first = a.low(gr, i), last = std::min(a.high(gr, stop - 1), length);
      for (; backward && done < std::min(first, next); ++done) write_gradients(done, keys_of(done));
      done = std::max(done, first);
      for (next = std::max(next, first); next < last; ++next) pack(next, keys_of(next));
      next_row = next;
      for (const Tile& tile : columns.tiles)
        for (int row = i; row < stop; ++row) take(gr, gc, row, tile, columns);
    }
    for (; backward && done < next; ++done) write_gradients(done, keys_of(done));
  }

  // The queries of `tile` in a row
  void take(int gr, int gc, int row, const Tile& tile, const Columns& columns) {
    const Axis& a = plan.axes[0];
    const Pattern& p = plan.patterns[tile.pattern];
    const int first = a.low(gr, row);
    resize_rows(a.high(gr, row) - first);
    table_row = first + a.base(gr, row);
    count = tile.count, vectors = tile.vectors;
    start_apart = int64_t(vectors) * LANES;
    for (int t = 0; t < count; ++t) {
      y[t] = int(row * c.dilation[0] + gr), x[t] = int((tile.first + t) * c.dilation[1] + gc);
      low[t] = p.low[t], high[t] = p.high[t], base[t] = p.base[t];
    }
    for (int r = 0; r < rows; ++r) {
      set_row(r, first + r >= 0 && first + r < a.keys(gr), first + r, tile.key - columns.from);
      starts[r] = head_bias() + p.at + (c.bias == 1 ? (table_row + r) * count * start_apart : 0);
    }
    const int later = next_row + row % BLOCK;  // keys that the next block of rows needs
    for (int t = 0; t < count; ++t) {
      if (later < a.keys(gr) && tile.first + t < plan.axes[1].keys(gc)) {
        prefetch(static_cast<const E*>(c.k), c.at_k, later * c.dilation[0] + gr, x[t], depth);
        prefetch(static_cast<const E*>(c.v), c.at_v, later * c.dilation[0] + gr, x[t], value_depth);
      }
      if (row + 1 >= a.queries(gr)) continue;
      prefetch(static_cast<const E*>(c.q), c.at_q, y[t] + c.dilation[0], x[t], depth);
      if (backward) prefetch(static_cast<const E*>(c.grad), c.at_grad, y[t] + c.dilation[0], x[t], value_depth);
    }
    backward ? backward_tile() : forward();
  }

  void by_windows(int gr, int gc, int begin, int end) {
    widest = 6;
    resize_rows(1);
    for (int i = begin; i < end; ++i)
      for (const Run& across : plan.runs[1][gc]) window(gr, gc, plan.runs[0][gr][i], across);
  }

  void window(int gr, int gc, const Run& down, const Run& across) {
    const int all_keys = down.keys * across.keys, all = down.count * across.count;
    stride = padded(all_keys), vectors = int(stride / LANES);
    resize_rings(1);
    auto keys_of = [&](auto* first, const Strides& at, auto& found) {
      for (int r = 0; r < down.keys; ++r) locate(first, at, gr, gc, down.key + r, across.key, across.keys, found);
    };
    pack(0, keys_of);
    set_row(0, true, 0, 0);
    const float* start = head_bias() + plan.window_at[down.pattern * plan.relative[1].size() + across.pattern];
    start_apart = c.bias == 1 ? stride : 0;
    const int most = int(std::max<int64_t>(1, std::min<int64_t>(TILE, LOGITS / stride)));
    const int tiles = (all + most - 1) / most;
    for (int tile = 0; tile < tiles; ++tile) {
      const int first = int(int64_t(all) * tile / tiles);
      count = int(int64_t(all) * (tile + 1) / tiles) - first;
      for (int t = 0; t < count; ++t) {
        y[t] = int((down.first + (first + t) / across.count) * c.dilation[0] + gr);
        x[t] = int((across.first + (first + t) % across.count) * c.dilation[1] + gc);
        low[t] = 0, high[t] = all_keys;
      }
      starts[0] = start + first * start_apart;
      backward ? backward_tile() : forward();
    }
    if (backward) write_gradients(0, keys_of);
  }

  // Adds this thread's part of the gradients of the bias
  void add_bias_gradients() {
    if (!c.dfirst) return;
    for (int64_t h = 0; h < c.heads; ++h) {
      if (c.bias == 1) plan.fold(table_grad.get(0) + h * plan.bias_size, c.dfirst + h * c.first_by_head);
      for (int side = 0; c.bias == 2 && side < 2; ++side) {
        const Side& s = sides[side];
        float* sum = side ? c.dsecond + h * c.second_by_head : c.dfirst + h * c.first_by_head;
        const float* each = sides[side].grad.get(0) + (h * s.rows + s.margin) * dp;
        for (int64_t i = 0; i < 2 * c.kernel[side] - 1; ++i)
          for (int64_t d = 0; d < depth; ++d) sum[i * depth + d] += each[i * dp + d];
      }
    }
  }
};

template <class E>
void run(const Call& c, bool backward) {
  const Plan plan(c);
  const int64_t heads = c.bias == 1 ? c.heads : 1, groups = c.dilation[0] * c.dilation[1];
  const int64_t units = c.batch * c.heads * groups;
  const int lines = plan.windows ? int(plan.runs[0][0].size()) : plan.axes[0].queries(0);
  // few units: pieces of their rows, each of which packs the rows that it shares with the next
  int64_t pieces = c.threads == 1 || backward ? 1 : (4 * c.threads + units - 1) / units;
  pieces = std::max<int64_t>(1, std::min<int64_t>(pieces, plan.windows ? lines : lines / (2 * c.kernel[0])));
  Buffer held;
  float* bias = held.get(heads * plan.bias_size);
#pragma omp parallel num_threads(int(c.threads))
  {
    Worker<E> worker(plan, bias, backward);
    auto work = [&](int64_t item) {
      const int64_t unit = item / pieces, piece = item % pieces, group = unit / c.heads % groups;
      const int gr = int(group / c.dilation[1]), gc = int(group % c.dilation[1]);
      worker.head = unit % c.heads, worker.image = unit / c.heads / groups;
      const int64_t n = plan.windows ? int64_t(plan.runs[0][gr].size()) : plan.axes[0].queries(gr);
      const int begin = int(n * piece / pieces), end = int(n * (piece + 1) / pieces);
      plan.windows ? worker.by_windows(gr, gc, begin, end) : worker.by_rows(gr, gc, begin, end);
    };
#pragma omp for
    for (int64_t h = 0; h < heads; ++h) plan.expand(h, bias + h * plan.bias_size);
    if (backward) {  // in a fixed order, as sums over units are rounded
#pragma omp for schedule(static)
      for (int64_t item = 0; item < units; ++item) work(item);
#pragma omp for ordered schedule(static, 1)
      for (int i = 0; i < omp_get_num_threads(); ++i) {
#pragma omp ordered
        worker.add_bias_gradients();
      }
    } else {
#pragma omp for schedule(dynamic)
      for (int64_t item = 0; item < units * pieces; ++item) work(item);
    }
  }
}

}  // namespace

extern "C" void foveal_attention(const Call* c, int backward) {
  c->half ? run<uint16_t>(*c, backward) : run<float>(*c, backward);
}
