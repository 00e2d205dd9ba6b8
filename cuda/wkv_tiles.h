// What the CPU kernels of every RWKV version share: rows of the inputs as float, tiles of the state, the threads.
//
// A head's state is [V,K] (value, key). Two layouts are worked on, each one tile of TILE columns wide, so that
// every multiply-add is (vector of the tile) x (one number) and nothing is ever summed across a vector:
//   value tile  X[key][TILE values]   sums over keys are vertical    (y, sa; in backward dv, G b)
//   key tile    X[value][TILE keys]   sums over values are vertical  (gradients of r, w, k, a, b)
// Tiles of one head are independent of each other: they are what threads share when there are few heads.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <algorithm>
#include <cstdint>
#include <vector>

namespace rwkv_nb {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int TILE = 2 * LANES;  // two registers wide: enough sums in flight to hide their latency
constexpr int CHUNK = 16;        // steps read at once; in backward also the distance of remembered states

typedef float Vec __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t IntVec __attribute__((vector_size(LANES * sizeof(int32_t))));

struct Tile {
  Vec x[2] = {};
  Tile() = default;
  // Copied register by register: left to itself GCC copies a Tile in halves, and reading it back then stalls.
  Tile(const Tile& o) : x{o.x[0], o.x[1]} {}
  Tile& operator=(const Tile& o) { x[0] = o.x[0]; x[1] = o.x[1]; return *this; }
};
using Tiles = std::vector<Tile>;

inline int64_t tiles_of(int64_t n) { return (n + TILE - 1) / TILE; }

// e^x in vector code (std::exp would need -ffast-math, which we must not use: it can switch off denormals in the
// whole process). Relative error about 1e-7; x is held to [-87, 88], where the result is a normal number.
inline Vec exp_vec(Vec x) {
  x = x < -87.0f ? Vec{} - 87.0f : x > 88.0f ? Vec{} + 88.0f : x;
  const Vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;      // nearest integer to x / ln 2
  const Vec f = (x - n * 0.693359375f) + n * 2.12194440e-4f;        // |f| <= ln 2 / 2
  Vec p = Vec{} + 1.0f / 5040;
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * f + c;
  const IntVec scale = (__builtin_convertvector(n, IntVec) + 127) << 23;
  return p * (Vec)scale;  // a cast between vectors keeps the bits
}

// e = exp(w), the rate of a raw decay input; the decay itself is exp(-e). From w = 4.7 it is 0 in float32 anyway,
// and holding w there keeps e finite.
inline Vec decay_rate(Vec w) { return exp_vec(w > 4.7f ? Vec{} + 4.7f : w); }

// CHUNK steps of some tiles of one tensor as floats, zero-padded to whole tiles.
struct Rows {
  int64_t count;  // tiles a step
  Tiles data;
  explicit Rows(int64_t tiles) : count(tiles), data(CHUNK * tiles) {}
  float* operator[](int64_t t) { return reinterpret_cast<float*>(&data[t * count]); }
  Tile& tile(int64_t t, int64_t j = 0) { return data[t * count + j]; }

  void to_decay(int64_t steps) {
    for (int64_t i = 0; i < steps * count; ++i)
      for (Vec& x : data[i].x) x = exp_vec(-decay_rate(x));
  }
};

// A tensor [B,T,H,N] of float, bfloat16 or half with any strides but the last, which is made 1.
class Sequence {
 public:
  explicit Sequence(const at::Tensor& x) : held_(x.stride(3) == 1 ? x : x.contiguous()) {
    const auto dtype = x.scalar_type();
    TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, "WKV on the CPU takes float32, "
                "bfloat16 and float16, not ", dtype);
    T_ = x.size(1), H_ = x.size(2), N_ = x.size(3);
    data_ = static_cast<char*>(held_.data_ptr());
    bytes_ = held_.element_size();
  }
  // Tiles first..last of steps t0..t0+steps of head bh to the front of rows. A step behind the end reads as `after`.
  void load(Rows& rows, int64_t bh, int64_t t0, int64_t steps, int64_t first, int64_t last, float after = 0) const {
    const int64_t columns = std::min(last * TILE, N_) - first * TILE;
    for (int64_t s = 0; s < steps; ++s)
      if (t0 + s >= T_) std::fill(rows[s], rows[s] + columns, after);
      else if (type() == at::kFloat) copy(rows[s], at<float>(bh, t0 + s, first), columns);
      else if (type() == at::kBFloat16) copy(rows[s], at<c10::BFloat16>(bh, t0 + s, first), columns);
      else copy(rows[s], at<c10::Half>(bh, t0 + s, first), columns);
  }
  // The way back.
  void store(Rows& rows, int64_t bh, int64_t t0, int64_t steps, int64_t first, int64_t last) const {
    const int64_t columns = std::min(last * TILE, N_) - first * TILE;
    for (int64_t s = 0; s < steps; ++s)
      if (type() == at::kFloat) copy(at<float>(bh, t0 + s, first), rows[s], columns);
      else if (type() == at::kBFloat16) copy(at<c10::BFloat16>(bh, t0 + s, first), rows[s], columns);
      else copy(at<c10::Half>(bh, t0 + s, first), rows[s], columns);
  }

 private:
  at::ScalarType type() const { return held_.scalar_type(); }
  template <typename X>
  X* at(int64_t bh, int64_t t, int64_t tile) const {
    return reinterpret_cast<X*>(data_ + bytes_ * (bh / H_ * held_.stride(0) + t * held_.stride(1) +
                                                  bh % H_ * held_.stride(2) + tile * TILE));
  }
  template <typename To, typename From>
  static void copy(To* __restrict to, const From* __restrict from, int64_t n) {
    int64_t i = 0;
    for (; i + TILE <= n; i += TILE)
      for (int64_t j = 0; j < TILE; ++j) to[i + j] = static_cast<To>(static_cast<float>(from[i + j]));
    for (; i < n; ++i) to[i] = static_cast<To>(static_cast<float>(from[i]));
  }

  at::Tensor held_;
  char* data_;
  int64_t T_, H_, N_, bytes_;
};

// A state [V,K] (null: zeros) to the value tiles X[tile][key], and back.
inline void load_values(Tiles& X, const float* state, int64_t N, int64_t first, int64_t last) {
  for (int64_t v = first * TILE; v < last * TILE; ++v)
    for (int64_t k = 0; k < N; ++k)
      X[v / TILE * N + k].x[v % TILE / LANES][v % LANES] = state && v < N ? state[v * N + k] : 0;
}
inline void store_values(float* state, const Tiles& X, int64_t N, int64_t first, int64_t last) {
  for (int64_t v = first * TILE; v < std::min(last * TILE, N); ++v)
    for (int64_t k = 0; k < N; ++k) state[v * N + k] = X[v / TILE * N + k].x[v % TILE / LANES][v % LANES];
}

// A state [V,K] (null: zeros) to one key tile X[value].
inline void load_keys(Tiles& X, const float* state, int64_t N, int64_t tile) {
  const int64_t columns = std::min<int64_t>(TILE, N - tile * TILE);
  for (int64_t v = 0; v < N; ++v) {
    X[v] = Tile();
    const float* row = state + v * N + tile * TILE;
    if (state) std::copy(row, row + columns, reinterpret_cast<float*>(&X[v]));
  }
}

// work.run(head, first tile, last tile + 1) over every tile of every head, with one Work(args...) a thread for its
// scratch memory. A head stays whole, where its tiles share reading the inputs, unless that would leave threads
// idle. The numbers that come out do not depend on the split.
template <typename Work, typename Args>
void for_heads(int64_t heads, int64_t tiles, const Args& args) {
  const int64_t parts = heads >= at::get_num_threads() ? 1 : tiles;
  at::parallel_for(0, heads * parts, 1, [&](int64_t begin, int64_t end) {
    Work work(args);
    for (int64_t i = begin; i < end; ++i)
      work.run(i / parts, i % parts * tiles / parts, (i % parts + 1) * tiles / parts);
  });
}

}  // namespace rwkv_nb
