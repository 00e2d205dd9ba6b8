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
#include <optional>
#include <type_traits>
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
constexpr int ROWS = 4;          // of a tile, held in registers for a whole chunk where no step needs the other rows
constexpr int CHUNK = 16;        // steps read at once; in backward also the distance of remembered states

typedef float Vec __attribute__((vector_size(LANES * sizeof(float))));
typedef float AnyVec __attribute__((vector_size(LANES * sizeof(float)), aligned(4)));  // at any address
typedef int32_t IntVec __attribute__((vector_size(LANES * sizeof(int32_t))));

inline Vec lanes(float x) { return x - Vec{}; }  // in every lane; read once for both registers of a tile

struct Tile {
  Vec x[2] = {};
  Tile() = default;
  // Copied register by register: left to itself GCC copies a Tile in halves, and reading it back then stalls.
  Tile(const Tile& o) : x{o.x[0], o.x[1]} {}
  Tile& operator=(const Tile& o) { x[0] = o.x[0]; x[1] = o.x[1]; return *this; }
};
using Tiles = std::vector<Tile>;

// ROWS rows of a tile, to be held in registers.
struct Block {
  Vec x[ROWS][2];
  Block() = default;
  explicit Block(const Tile* from) {
#pragma GCC unroll 4
    for (int n = 0; n < ROWS; ++n)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) x[n][i] = from[n].x[i];
  }
  void store(Tile* to) const {
#pragma GCC unroll 4
    for (int n = 0; n < ROWS; ++n)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) to[n].x[i] = x[n][i];
  }
};

inline float* floats(Tiles& x) { return reinterpret_cast<float*>(x.data()); }
inline int64_t tiles_of(int64_t n) { return (n + TILE - 1) / TILE; }
inline int64_t rows_of(int64_t n) { return (n + ROWS - 1) / ROWS * ROWS; }  // of a state's tile: whole blocks

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

// CHUNK steps of one tensor and head as floats, zero-padded to whole tiles.
struct Rows {
  int64_t tiles;  // a step
  Tiles data;
  explicit Rows(int64_t tiles) : tiles(tiles), data(CHUNK * tiles) {}
  float* operator[](int64_t t) { return reinterpret_cast<float*>(&data[t * tiles]); }
  Tile& tile(int64_t t, int64_t j) { return data[t * tiles + j]; }
};

// Σ a b and Σ u a b of step t.
inline float dot(int64_t t, Rows& a, Rows& b, const Tiles* u = nullptr) {
  Vec sum{};
  for (int64_t j = 0; j < a.tiles; ++j)
    for (int i = 0; i < 2; ++i) {
      const Vec ab = a.tile(t, j).x[i] * b.tile(t, j).x[i];
      sum += u ? (*u)[j].x[i] * ab : ab;
    }
  float total = 0;
  for (int l = 0; l < LANES; ++l) total += sum[l];
  return total;
}

// Raw decay inputs w to their rates, in place, and to decays, tiles first..last. Near 1, a decay's rounding would be
// the same at every step and add up over thousands of them; so what one step's loses, the chunk's next step makes good.
inline void to_decay(Rows& decay, Rows& w, int64_t steps, int64_t first, int64_t last) {
  for (int64_t j = first; j < last; ++j)
    for (int i = 0; i < 2; ++i) {
      Vec lost{};
      for (int64_t t = 0; t < steps; ++t) {
        const Vec e = decay_rate(w.tile(t, j).x[i]);
        w.tile(t, j).x[i] = e;
        Vec fall = 1.0f - e / 7;  // 1 - exp(-e) for small e
        for (float c : {1.0f / 6, 1.0f / 5, 0.25f, 1.0f / 3, 0.5f}) fall = 1.0f - e * c * fall;
        fall = e * fall + lost;
        const Vec near = 1.0f - fall;
        const auto small = e < 0.25f;
        lost = small ? fall - (1.0f - near) : Vec{};
        decay.tile(t, j).x[i] = small ? near : e > 87.0f ? Vec{} : exp_vec(-e);
      }
    }
}

// A tensor [B,T,H,N] of float, bfloat16 or half with any strides but the last, which is made 1. Its rows are copied
// before they are worked on: neighbours in time lie C numbers apart, which for many C is one and the same cache set.
class Sequence {
 public:
  explicit Sequence(const at::Tensor& x) : held_(x.stride(3) == 1 ? x : x.contiguous()), dtype_(x.scalar_type()) {
    TORCH_CHECK(dtype_ == at::kFloat || dtype_ == at::kBFloat16 || dtype_ == at::kHalf, "WKV on the CPU takes ",
                "float32, bfloat16 and float16, not ", dtype_);
    T_ = x.size(1), H_ = x.size(2), N_ = x.size(3);
    size_ = held_.element_size();
    stride_b_ = held_.stride(0) * size_, stride_t_ = held_.stride(1) * size_, stride_h_ = held_.stride(2) * size_;
    data_ = static_cast<char*>(held_.data_ptr());
  }
  // Tiles first..last of steps t0..t0+steps of head bh to rows. A step behind the end reads as 0.
  void load(Rows& rows, int64_t bh, int64_t t0, int64_t steps, int64_t first, int64_t last) const {
    const int64_t from = first * TILE, n = std::min(last * TILE, N_) - from;
    for (int64_t s = 0; s < steps; ++s) {
      float* to = rows[s] + from;
      if (t0 + s >= T_) std::fill(to, to + n, 0.0f);
      else with_row(bh, t0 + s, from, [&](const auto* x) { copy(to, x, n); });
    }
  }
  // The way back.
  void store(Rows& rows, int64_t bh, int64_t t0, int64_t steps, int64_t first, int64_t last) const {
    const int64_t from = first * TILE, n = std::min(last * TILE, N_) - from;
    for (int64_t s = 0; s < steps; ++s)
      with_row(bh, t0 + s, from, [&](auto* x) { copy(x, rows[s] + from, n); });
  }
  // Has a row that will be wanted, if there is such a step, brought near: no processor foresees rows so far apart.
  void ask(int64_t bh, int64_t t) const {
    __asm__ volatile("");  // else GCC takes a function that only prefetches for one that does nothing
    if (t >= 0 && t < T_)
      for (int64_t i = 0; i < N_ * size_; i += 64) __builtin_prefetch(row(bh, t, 0) + i, 0, 2);
  }

 private:
  char* row(int64_t bh, int64_t t, int64_t n) const {
    return data_ + bh / H_ * stride_b_ + t * stride_t_ + bh % H_ * stride_h_ + n * size_;
  }
  template <typename Use>
  void with_row(int64_t bh, int64_t t, int64_t n, const Use& use) const {
    if (dtype_ == at::kFloat) use(reinterpret_cast<float*>(row(bh, t, n)));
    else if (dtype_ == at::kBFloat16) use(reinterpret_cast<c10::BFloat16*>(row(bh, t, n)));
    else use(reinterpret_cast<c10::Half*>(row(bh, t, n)));
  }
  template <typename To, typename From>
  static void copy(To* __restrict to, const From* __restrict from, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)  // in whole registers
      if constexpr (std::is_same_v<To, From>)
        reinterpret_cast<AnyVec&>(to[i]) = reinterpret_cast<const AnyVec&>(from[i]);
      else
        for (int j = 0; j < LANES; ++j) to[i + j] = static_cast<To>(static_cast<float>(from[i + j]));
    for (; i < n; ++i) to[i] = static_cast<To>(static_cast<float>(from[i]));
  }

  at::Tensor held_;
  at::ScalarType dtype_;
  char* data_;
  int64_t T_, H_, N_, size_, stride_b_, stride_t_, stride_h_;
};

using OptTensor = std::optional<at::Tensor>;

inline const float* head_of(const OptTensor& state, int64_t bh, int64_t N) {
  return state ? state->const_data_ptr<float>() + bh * N * N : nullptr;
}

// A state [V,K] (null: zeros) to the value tiles X[tile][key], and back. Rows and columns behind the end are zeros.
inline void load_values(Tiles& X, const float* state, int64_t N, int64_t first, int64_t last) {
  const int64_t rows = rows_of(N);
  std::fill_n(X.begin() + first * rows, (last - first) * rows, Tile());
  for (int64_t v = first * TILE; state && v < std::min(last * TILE, N); ++v)
    for (int64_t k = 0; k < N; ++k) floats(X)[(v / TILE * rows + k) * TILE + v % TILE] = state[v * N + k];
}
inline void store_values(float* state, Tiles& X, int64_t N, int64_t first, int64_t last) {
  for (int64_t v = first * TILE; v < std::min(last * TILE, N); ++v)
    for (int64_t k = 0; k < N; ++k) state[v * N + k] = floats(X)[(v / TILE * rows_of(N) + k) * TILE + v % TILE];
}

// A state [V,K] (null: zeros) to the key tiles X[tile][value], and back.
inline void load_keys(Tiles& X, const float* state, int64_t N, int64_t first, int64_t last) {
  const int64_t rows = rows_of(N);
  std::fill_n(X.begin() + first * rows, (last - first) * rows, Tile());
  for (int64_t j = first; state && j < last; ++j)
    for (int64_t v = 0; v < N; ++v)
      std::copy_n(state + v * N + j * TILE, std::min<int64_t>(TILE, N - j * TILE), floats(X) + (j * rows + v) * TILE);
}
inline void store_keys(float* state, Tiles& X, int64_t N, int64_t first, int64_t last) {
  for (int64_t j = first; j < last; ++j)
    for (int64_t v = 0; v < N; ++v)
      std::copy_n(floats(X) + (j * rows_of(N) + v) * TILE, std::min<int64_t>(TILE, N - j * TILE),
                  state + v * N + j * TILE);
}

// Of a chunk's `units` of work, n..n+step are done: that share of the rows of the chunk at t0 is asked for. Spread like
// this, the wait for memory hides behind the work.
inline void ask(const std::vector<const Sequence*>& wanted, int64_t bh, int64_t t0, int64_t n, int64_t units,
                int64_t step) {
  const int64_t size = wanted.size();
  for (int64_t i = n * size * CHUNK / units; i < (n + step) * size * CHUNK / units; ++i)
    wanted[i % size]->ask(bh, t0 + i / size);
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
