// One token of one text through RWKV-7's blocks on a CPU. Written in PyTorch (rwkv_nb/model/rwkv7.py, the definition) a
// token is a hundred small operators a layer, and calling them takes about as long as reading the weights. Here a layer
// is five parallel loops over rows of its matrices, each read once in its own dtype; all else is float32.
#include "wkv_tiles.h"
#include <torch/library.h>
#include <cmath>

namespace rwkv_nb {
namespace {

using at::Tensor;
using Floats = std::vector<float>;

// As rwkv_nb/model/token7.py lists them. The first six matrices are three each: W [out,in], and A [R,in] and B [out,R]
// of its adapter, empty where there is none. The low-rank ones behind them come transposed, [out,in] too.
enum Vectors { LN1, LN1_BIAS, LN2, LN2_BIAS, LN_X, LN_X_BIAS, X_R, X_W, X_K, X_V, X_A, X_G, W0, A0, V0, K_K, K_A, R_K,
               FFN_X_K, VECTORS };
enum Matrices { RECEPTANCE, KEY = 3, VALUE = 6, OUTPUT = 9, FFN_KEY = 12, FFN_VALUE = 15, W1 = 18, W2, A1, A2, V1, V2,
                G1, G2, MATRICES };

constexpr int AHEAD = 2048;  // bytes that are asked for in time: left to itself a processor stops at every page's end

typedef uint16_t Bits __attribute__((vector_size(LANES * sizeof(uint16_t)), aligned(2)));

Vec vec(const float* x) { return reinterpret_cast<const AnyVec&>(*x); }
Vec vec(const at::BFloat16* x) {  // the upper half of a float
  return (Vec)(__builtin_convertvector(reinterpret_cast<const Bits&>(*x), IntVec) << 16);
}
Vec vec(const at::Half* x) {
  Vec out;
  for (int j = 0; j < LANES; ++j) out[j] = static_cast<float>(x[j]);
  return out;
}

template <typename T>
float dot(const T* w, const float* x, int64_t n) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES)
    for (int j = 0; j < 4; ++j) {
      __builtin_prefetch(reinterpret_cast<const char*>(w + i + j * LANES) + AHEAD);
      sums[j] += vec(w + i + j * LANES) * vec(x + i + j * LANES);
    }
  float sum = 0;
  const Vec all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (int j = 0; j < LANES; ++j) sum += all[j];
  for (; i < n; ++i) sum += static_cast<float>(w[i]) * x[i];
  return sum;
}

// W[row] · x
float dot(const Tensor& W, int64_t row, const float* x) {
  const int64_t n = W.size(1);
  switch (W.scalar_type()) {
    case at::kFloat: return dot(W.const_data_ptr<float>() + row * n, x, n);
    case at::kBFloat16: return dot(W.const_data_ptr<at::BFloat16>() + row * n, x, n);
    case at::kHalf: return dot(W.const_data_ptr<at::Half>() + row * n, x, n);
    default: TORCH_CHECK(false, "token7 takes float32, bfloat16 and float16, not ", W.scalar_type());
  }
}

struct Product {  // y = W x + B m
  const Tensor& W;
  const float* x;
  float* y;
  const Tensor* B = nullptr;
  const float* m = nullptr;
};

// All rows of all products, shared among the threads.
void compute(const std::vector<Product>& products) {
  int64_t rows = 0;
  for (const auto& p : products) rows += p.W.size(0);
  at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    for (const auto& p : products) {
      const int64_t n = p.W.size(0);
      for (int64_t i = std::max<int64_t>(begin, 0); i < std::min(end, n); ++i)
        p.y[i] = dot(p.W, i, p.x) + (p.B ? dot(*p.B, i, p.m) : 0);
      begin -= n, end -= n;
    }
  });
}

struct Linear {  // three matrices, and what goes in and comes out
  const Tensor* of;
  const float* x;
  float* y;
};

// The linear layers with their adapters, and other products beside them.
void compute(const std::vector<Linear>& linears, std::vector<Product> products = {}) {
  std::vector<Floats> middle;
  std::vector<Product> narrow;
  for (const auto& l : linears) {
    const bool adapted = l.of[1].numel();
    middle.emplace_back(l.of[1].size(0));
    if (adapted) narrow.push_back({l.of[1], l.x, middle.back().data()});
    products.push_back({l.of[0], l.x, l.y, adapted ? &l.of[2] : nullptr, middle.back().data()});
  }
  if (!narrow.empty()) compute(narrow);
  compute(products);
}

void layer_norm(const float* x, int64_t n, const float* weight, const float* bias, float eps, float* y) {
  float mean = 0, spread = 0;
  for (int64_t i = 0; i < n; ++i) mean += x[i];
  mean /= n;
  for (int64_t i = 0; i < n; ++i) spread += (x[i] - mean) * (x[i] - mean);
  const float scale = 1 / std::sqrt(spread / n + eps);
  for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

struct Token {
  int64_t C, N;
  float* x;  // what runs through the blocks
  Floats v_first;

  // One block. p: its vectors [VECTORS,C]; m: its matrices; att_x, ffn_x [C] and S [H,N,N] are this layer's state.
  void block(const float* p, const Tensor* m, float* att_x, float* S, float* ffn_x) {
    Floats z(C), in(6 * C), r(C), k(C), v(C), y(C), wide(m[FFN_KEY].size(0));
    Floats w(m[W1].size(0)), a(m[A1].size(0)), g(m[G1].size(0)), vv(m[V1].size(0));
    const auto shifted = [&](int norm, int first, int count, float* last) {
      layer_norm(x, C, p + norm * C, p + (norm + 1) * C, 1e-5f, z.data());
      for (int j = 0; j < count; ++j)
        for (int64_t i = 0; i < C; ++i) in[j * C + i] = z[i] + (last[i] - z[i]) * p[(first + j) * C + i];
      std::copy(z.begin(), z.end(), last);
    };
    const auto input = [&](int vector) { return &in[(vector - X_R) * C]; };
    shifted(LN1, X_R, 6, att_x);
    compute({{m + RECEPTANCE, input(X_R), r.data()}, {m + KEY, input(X_K), k.data()}, {m + VALUE, input(X_V), v.data()}},
            {{m[W1], input(X_W), w.data()}, {m[A1], input(X_A), a.data()}, {m[V1], input(X_V), vv.data()},
             {m[G1], input(X_G), g.data()}});
    for (float& i : w) i = std::tanh(i);
    for (float& i : g) i = sigmoid(i);
    if (v_first.empty()) v_first = v;
    at::parallel_for(0, C / N, 1, [&](int64_t begin, int64_t end) {
      Floats d(N), key(N), kk(N), b(N);
      for (int64_t h = begin; h < end; ++h) {
        float square = 0, bonus = 0;
        for (int64_t i = 0, c = h * N; i < N; ++i, ++c) {
          const auto own = [&](int vector) { return p[vector * C + c]; };
          d[i] = std::exp(-0.60653066f * sigmoid(own(W0) + dot(m[W2], c, w.data())));  // e^-0.5: model/rwkv7.py
          b[i] = sigmoid(own(A0) + dot(m[A2], c, a.data()));
          if (m[V2].numel()) v[c] += (v_first[c] - v[c]) * sigmoid(own(V0) + dot(m[V2], c, vv.data()));
          key[i] = k[c] * (1 + (b[i] - 1) * own(K_A));
          kk[i] = k[c] * own(K_K);
          square += kk[i] * kk[i];
          bonus += r[c] * key[i] * own(R_K);
        }
        const float scale = 1 / std::max(std::sqrt(square), 1e-12f);
        for (int64_t i = 0; i < N; ++i) b[i] *= kk[i] * scale, kk[i] *= -scale;
        for (int64_t i = 0; i < N; ++i) {  // a row of the state: sa = S a;  S = S diag(d) + sa bᵀ + v keyᵀ;  y = S r
          float *row = S + (h * N + i) * N, sa = dot(row, kk.data(), N), vi = v[h * N + i];
          for (int64_t j = 0; j < N; ++j) row[j] = row[j] * d[j] + sa * b[j] + vi * key[j];
          y[h * N + i] = dot(row, &r[h * N], N);
        }
        float* out = &y[h * N];
        layer_norm(out, N, p + LN_X * C + h * N, p + LN_X_BIAS * C + h * N, 64e-5f, out);
        for (int64_t i = 0, c = h * N; i < N; ++i, ++c) y[c] = (y[c] + bonus * v[c]) * dot(m[G2], c, g.data());
      }
    });
    compute({{m + OUTPUT, y.data(), z.data()}});
    for (int64_t i = 0; i < C; ++i) x[i] += z[i];
    shifted(LN2, FFN_X_K, 1, ffn_x);
    compute({{m + FFN_KEY, in.data(), wide.data()}});
    for (float& i : wide) i = i > 0 ? i * i : 0;
    compute({{m + FFN_VALUE, wide.data(), z.data()}});
    for (int64_t i = 0; i < C; ++i) x[i] += z[i];
  }
};

// x [C], the token's embedding behind ln0; vectors [L,VECTORS,C] float32; matrices: MATRICES a layer; the state, att_x
// and ffn_x [L,1,C], wkv [L,1,H,N,N] float32, moves on in place. → x [C] float32 behind the last block.
Tensor token7(const Tensor& x, const Tensor& vectors, const std::vector<Tensor>& matrices, const Tensor& att_x,
              const Tensor& wkv, const Tensor& ffn_x) {
  const int64_t L = vectors.size(0), C = vectors.size(2), N = wkv.size(-1);
  TORCH_CHECK(static_cast<int64_t>(matrices.size()) == L * MATRICES && vectors.size(1) == VECTORS && wkv.size(1) == 1 &&
              vectors.is_contiguous() && wkv.is_contiguous(), "token7: these are not its arguments");
  const Tensor out = x.to(at::kFloat, false, true).contiguous(), att = att_x.to(at::kFloat), ffn = ffn_x.to(at::kFloat);
  Token token{C, N, out.mutable_data_ptr<float>(), {}};
  for (int64_t l = 0; l < L; ++l)
    token.block(vectors.const_data_ptr<float>() + l * VECTORS * C, &matrices[l * MATRICES],
                att.mutable_data_ptr<float>() + l * C, wkv.mutable_data_ptr<float>() + l * C * N,
                ffn.mutable_data_ptr<float>() + l * C);
  att_x.copy_(att), ffn_x.copy_(ffn);
  return out;
}

TORCH_LIBRARY_FRAGMENT(rwkv_nb, m) {
  m.def("token7(Tensor x, Tensor vectors, Tensor[] matrices, Tensor(a!) att_x, Tensor(b!) wkv, Tensor(c!) ffn_x) -> "
        "Tensor");
}

TORCH_LIBRARY_IMPL(rwkv_nb, CPU, m) { m.impl("token7", token7); }

}  // namespace
}  // namespace rwkv_nb
