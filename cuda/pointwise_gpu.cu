// RWKV's pointwise steps around WKV on GPUs, each in one pass over memory, forward and backward. The formulas are in
// pointwise_gpu.h; the sums are made in float, and each result is rounded once.
#include "pointwise_gpu.h"
#include "wkv_gpu.cuh"

namespace rwkv_nb {
namespace {

constexpr int THREADS = 128, LANES = 16;  // a head of 64 channels: four each of 16 lanes

template <typename Real> __device__ inline Quads load(const void* from, int64_t at) {
  return from ? unpack(static_cast<const Quad<Real>*>(from)[at]) : Quads{};
}
template <typename Real> __device__ inline void store(void* to, int64_t at, const Quads& x) {
  if (to) static_cast<Quad<Real>*>(to)[at] = pack<Real>(x);
}
__device__ inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }
__device__ inline float log_sigmoid(float x) { return fminf(x, 0) - log1pf(expf(-fabsf(x))); }

__device__ inline float over_head(float x) {  // the sum over a head's lanes, in each of them
  for (int far = LANES / 2; far; far /= 2) x += __shfl_xor_sync(0xffffffffu, x, far);
  return x;
}

// -- token shift: a thread has four channels of one token --------------------------------------------------------------

template <typename Real> __global__ void shift(Shift s) {
  const int64_t quads = s.C / 4, at = blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x, row = at / quads;
  if (row >= s.B * s.T) return;
  const int64_t column = at % quads, t = row % s.T;
  const bool begins = s.starts ? s.starts[row] : false;
  const Quads x = load<Real>(s.x, at), before = begins ? Quads{} : t ? load<Real>(s.x, at - quads)
                                                                     : load<Real>(s.last, row / s.T * quads + column);
  for (int i = 0; i < s.mixes; ++i) {
    const Quads mix = load<Real>(s.mix[i], s.each ? at : column);
    Quads y;
    for (int f = 0; f < 4; ++f) y.x[f] = x.x[f] + (before.x[f] - x.x[f]) * mix.x[f];
    store<Real>(s.y[i], at, y);
  }
}

template <typename Real> __global__ void shift_back(Shift s) {
  const int64_t quads = s.C / 4, at = blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x, row = at / quads;
  if (row >= s.B * s.T) return;
  const int64_t column = at % quads, t = row % s.T;
  const bool begins = s.starts && s.starts[row], followed = t + 1 < s.T && !(s.starts && s.starts[row + 1]);
  const Quads x = s.each ? load<Real>(s.x, at) : Quads{};
  const Quads before = !s.each || begins ? Quads{} : t ? load<Real>(s.x, at - quads)
                                                       : load<Real>(s.last, row / s.T * quads + column);
  Quads dx{}, dlast{};
  for (int i = 0; i < s.mixes; ++i) {
    const Quads dy = load<Real>(s.dy[i], at), mix = load<Real>(s.mix[i], s.each ? at : column);
    for (int f = 0; f < 4; ++f) dx.x[f] += dy.x[f] * (1 - mix.x[f]), dlast.x[f] += dy.x[f] * mix.x[f];
    if (followed) {
      const Quads next = load<Real>(s.dy[i], at + quads), its = s.each ? load<Real>(s.mix[i], at + quads) : mix;
      for (int f = 0; f < 4; ++f) dx.x[f] += next.x[f] * its.x[f];
    }
    if (s.each) {
      Quads dmix;
      for (int f = 0; f < 4; ++f) dmix.x[f] = dy.x[f] * (before.x[f] - x.x[f]);
      store<Real>(s.dmix[i], at, dmix);
    }
  }
  store<Real>(s.dx, at, dx);
  if (!t) store<Real>(s.dlast, row / s.T * quads + column, dlast);
}

// -- head by head: LANES threads have one head of one token ------------------------------------------------------------

// Which quad of [M,H,64] is this thread's, which of [H,64], and whether there is one: the others compute the last again.
struct Spot16 {
  int64_t at, head;
  bool mine;
  __device__ Spot16(int64_t M, int64_t H) {
    const int64_t quad = blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x, all = M * H * LANES;
    mine = quad < all;
    at = mine ? quad : all - LANES + threadIdx.x % LANES;
    head = at % (H * LANES);
  }
};

// What forward and backward of `Prepare` both need.
struct Keys {
  Quads decay, rate, a, k, v, mix, v_first, k_k, k_a, kk;
  float length;
  template <typename Real> __device__ void read(const Prepare& p, const Spot16& spot) {
    decay = load<Real>(p.decay, spot.at), rate = load<Real>(p.rate, spot.at), k = load<Real>(p.k, spot.at);
    v = load<Real>(p.v, spot.at), mix = load<Real>(p.mix, spot.at), v_first = load<Real>(p.v_first, spot.at);
    k_k = load<Real>(p.k_k, spot.head), k_a = load<Real>(p.k_a, spot.head);
    float squares = 0;
    for (int f = 0; f < 4; ++f) kk.x[f] = k.x[f] * k_k.x[f], squares += kk.x[f] * kk.x[f];
    length = fmaxf(sqrtf(over_head(squares)), 1e-12f);
    for (int f = 0; f < 4; ++f) {
      kk.x[f] /= length, a.x[f] = sigmoid(rate.x[f]);
      mix.x[f] = p.mix ? sigmoid(mix.x[f]) : 0;
    }
  }
};

template <typename Real> __global__ void prepare(Prepare p) {
  const Spot16 spot(p.M, p.H);
  Keys in;
  in.read<Real>(p, spot);
  Quads w, key, value, minus;
  for (int f = 0; f < 4; ++f) {
    w.x[f] = log_sigmoid(in.decay.x[f]) - 0.5f;
    key.x[f] = in.k.x[f] * (1 + (in.a.x[f] - 1) * in.k_a.x[f]);
    value.x[f] = in.v.x[f] + (in.v_first.x[f] - in.v.x[f]) * in.mix.x[f];
    minus.x[f] = -in.kk.x[f] * in.a.x[f];
  }
  if (!spot.mine) return;
  store<Real>(p.w, spot.at, w), store<Real>(p.key, spot.at, key), store<Real>(p.value, spot.at, value);
  store<Real>(p.kk, spot.at, in.kk), store<Real>(p.minus, spot.at, minus);
}

template <typename Real> __global__ void prepare_back(Prepare p) {
  const Spot16 spot(p.M, p.H);
  Keys in;
  in.read<Real>(p, spot);
  const Quads d_w = load<Real>(p.d_w, spot.at), d_key = load<Real>(p.d_key, spot.at);
  const Quads d_value = load<Real>(p.d_value, spot.at), d_minus = load<Real>(p.d_minus, spot.at);
  Quads d_kk = load<Real>(p.d_kk, spot.at), d_decay, d_rate, d_k, d_v, d_mix, d_v_first;
  float along = 0;  // the part of kk's gradient that would change its length
  for (int f = 0; f < 4; ++f) {
    const float a = in.a.x[f], mix = in.mix.x[f];
    d_kk.x[f] -= d_minus.x[f] * a, along += d_kk.x[f] * in.kk.x[f];
    d_decay.x[f] = d_w.x[f] * sigmoid(-in.decay.x[f]);
    d_rate.x[f] = (d_key.x[f] * in.k.x[f] * in.k_a.x[f] - d_minus.x[f] * in.kk.x[f]) * a * (1 - a);
    d_v.x[f] = d_value.x[f] * (1 - mix), d_v_first.x[f] = d_value.x[f] * mix;
    d_mix.x[f] = d_value.x[f] * (in.v_first.x[f] - in.v.x[f]) * mix * (1 - mix);
  }
  along = over_head(along);
  for (int f = 0; f < 4; ++f)
    d_k.x[f] = d_key.x[f] * (1 + (in.a.x[f] - 1) * in.k_a.x[f]) +
               (d_kk.x[f] - in.kk.x[f] * along) / in.length * in.k_k.x[f];
  if (!spot.mine) return;
  store<Real>(p.d_decay, spot.at, d_decay), store<Real>(p.d_rate, spot.at, d_rate), store<Real>(p.d_k, spot.at, d_k);
  store<Real>(p.d_v, spot.at, d_v), store<Real>(p.d_mix, spot.at, d_mix), store<Real>(p.d_v_first, spot.at, d_v_first);
}

// What forward and backward of `Finish` both need. z: out without its gate.
struct Normed {
  Quads y, r, k, v, r_k, weight, gate, z;
  float rstd, bonus;
  template <typename Real> __device__ void read(const Finish& p, const Spot16& spot) {
    y = load<Real>(p.y, spot.at), r = load<Real>(p.r, spot.at), k = load<Real>(p.k, spot.at);
    v = load<Real>(p.v, spot.at), gate = load<Real>(p.gate, spot.at), r_k = load<Real>(p.r_k, spot.head);
    weight = load<Real>(p.weight, spot.head);
    const Quads bias = load<Real>(p.bias, spot.head);
    float sum = 0, squares = 0, products = 0;
    for (int f = 0; f < 4; ++f) sum += y.x[f], products += r.x[f] * k.x[f] * r_k.x[f];
    const float mean = over_head(sum) / N;
    for (int f = 0; f < 4; ++f) y.x[f] -= mean, squares += y.x[f] * y.x[f];
    rstd = 1 / sqrtf(over_head(squares) / N + p.eps);
    bonus = p.r ? over_head(products) : 0;
    for (int f = 0; f < 4; ++f) {
      y.x[f] *= rstd;
      z.x[f] = y.x[f] * weight.x[f] + bias.x[f] + bonus * v.x[f];
    }
  }
};

template <typename Real> __global__ void finish(Finish p) {
  const Spot16 spot(p.M, p.H);
  Normed in;
  in.read<Real>(p, spot);
  Quads out;
  for (int f = 0; f < 4; ++f) out.x[f] = in.z.x[f] * in.gate.x[f] * (p.r ? 1 : sigmoid(in.gate.x[f]));
  if (spot.mine) store<Real>(p.out, spot.at, out);
}

template <typename Real> __global__ void finish_back(Finish p) {
  const Spot16 spot(p.M, p.H);
  Normed in;
  in.read<Real>(p, spot);
  const Quads d_out = load<Real>(p.d_out, spot.at);
  Quads d_z, d_y, d_r, d_k, d_v, d_gate;
  float sum = 0, along = 0, d_bonus = 0;
  for (int f = 0; f < 4; ++f) {
    const float g = in.gate.x[f], s = sigmoid(g);
    d_gate.x[f] = d_out.x[f] * in.z.x[f] * (p.r ? 1 : s * (1 + g * (1 - s)));
    d_z.x[f] = d_out.x[f] * g * (p.r ? 1 : s);
    d_y.x[f] = d_z.x[f] * in.weight.x[f];
    sum += d_y.x[f], along += d_y.x[f] * in.y.x[f], d_bonus += d_z.x[f] * in.v.x[f];
  }
  sum = over_head(sum) / N, along = over_head(along) / N, d_bonus = over_head(d_bonus);
  for (int f = 0; f < 4; ++f) {
    d_y.x[f] = in.rstd * (d_y.x[f] - sum - in.y.x[f] * along);
    d_r.x[f] = d_bonus * in.k.x[f] * in.r_k.x[f], d_k.x[f] = d_bonus * in.r.x[f] * in.r_k.x[f];
    d_v.x[f] = d_z.x[f] * in.bonus;
  }
  if (!spot.mine) return;
  store<Real>(p.d_y, spot.at, d_y), store<Real>(p.d_r, spot.at, d_r), store<Real>(p.d_k, spot.at, d_k);
  store<Real>(p.d_v, spot.at, d_v), store<Real>(p.d_gate, spot.at, d_gate);
}

int64_t blocks_of(int64_t threads) { return (threads + THREADS - 1) / THREADS; }

template <typename Real> void run(const Shift& s, bool back, void* stream) {
  const int64_t blocks = blocks_of(s.B * s.T * s.C / 4);
  if (back) LAUNCH(blocks, THREADS, stream, shift_back<Real>, s);
  else LAUNCH(blocks, THREADS, stream, shift<Real>, s);
}
template <typename Real> void run(const Prepare& p, bool back, void* stream) {
  if (back) LAUNCH(blocks_of(p.M * p.H * LANES), THREADS, stream, prepare_back<Real>, p);
  else LAUNCH(blocks_of(p.M * p.H * LANES), THREADS, stream, prepare<Real>, p);
}
template <typename Real> void run(const Finish& p, bool back, void* stream) {
  if (back) LAUNCH(blocks_of(p.M * p.H * LANES), THREADS, stream, finish_back<Real>, p);
  else LAUNCH(blocks_of(p.M * p.H * LANES), THREADS, stream, finish<Real>, p);
}

template <typename Step> int run_as(const Step& step, bool back, void* stream) {
  if (step.type == 0) run<float>(step, back, stream);
  else if (step.type == 1) run<__nv_bfloat16>(step, back, stream);
  else if (step.type == 2) run<__half>(step, back, stream);
  else return REFUSED;
  return static_cast<int>(cudaGetLastError());
}

}  // namespace
}  // namespace rwkv_nb

extern "C" int rwkv_nb_shift(const rwkv_nb::Shift* x, bool back, void* stream) { return rwkv_nb::run_as(*x, back, stream); }
extern "C" int rwkv_nb_prepare(const rwkv_nb::Prepare* x, bool back, void* stream) { return rwkv_nb::run_as(*x, back, stream); }
extern "C" int rwkv_nb_finish(const rwkv_nb::Finish* x, bool back, void* stream) { return rwkv_nb::run_as(*x, back, stream); }
