// The recurrences' gradients on CPUs, in the words of wkv_cpu.h.
// Backward, with G_t the gradient at S_t and e_t the one at q_t (WKV-7: e_t = G_t b_t; WKV-6: e_t = dy_t):
//   G_t = G_{t+1} diag(d_{t+1}) + e_{t+1} a_{t+1}ᵀ     WKV-7: + dy_t r_tᵀ
// Once forward in time, over key tiles, to have S at the start of every chunk; then chunk by chunk back in time:
//   values  G over value tiles, for dv = G k (WKV-6: + own dy) and WKV-7's e
//   recall  S of the chunk over key tiles, computed again (never divided back: a decay may be 0), for da = S_{t-1}ᵀ e
//           and WKV-7's dr = S_tᵀ dy
//   keys    G over key tiles, for dk = Gᵀ v, dd = Σ_v G ⊙ S_{t-1} and WKV-7's db = Gᵀ q
// and in WKV-6, with vdy = v·dy, the rest of dr = u k vdy, of dk = u r vdy, and du = Σ_t r k vdy.
// Keys and recall need only a row of S and G at a time: ROWS of them stay in registers for a whole chunk.
#pragma once
#include "wkv_cpu.h"
#include <utility>

namespace rwkv_nb {

// Where gradients go to.
struct Gradients {
  std::optional<Sequence> dr, dw, dk, dv, da, db;  // WKV-6: no dr (a is r) and db; WKV-5: no dw either
  Tensor sum_w, sum_u;                             // WKV-6, -5: [B,H,N], sums over the steps
};

struct BackwardArgs {
  const Inputs& in;
  Sequence q;  // WKV-7
  std::optional<Sequence> dy;
  OptTensor dlast;
  const Gradients& grads;
  Tensor dstate;  // empty where no state was given
};

template <bool DELTA>
struct Backward {
  const BackwardArgs& to;
  const Inputs& in = to.in;
  const int64_t tiles = in.tiles, rows = in.rows, chunks = (in.T + CHUNK - 1) / CHUNK;
  Rows r{tiles}, w{tiles}, d{tiles}, k{tiles}, v{tiles}, a{tiles}, b{tiles}, q{tiles}, dy{tiles}, Gb{tiles};
  Rows dr{tiles}, dw{tiles}, dk{tiles}, dv{tiles}, da{tiles}, db{tiles};
  Rows& e = DELTA ? Gb : dy;
  Tiles S = Tiles(chunks * tiles * rows);                                // key tiles: the state before every chunk
  Tiles GK = Tiles(tiles * rows), GV = Tiles(tiles * rows);              // G as key tiles and as value tiles
  Tiles p = Tiles(tiles), d_next = Tiles(tiles), a_next = Tiles(tiles);  // e, d and a of the step after the chunk
  Tiles u = Tiles(tiles), sum_w = Tiles(tiles), sum_u = Tiles(tiles);
  Tile past[CHUNK][ROWS];                                                // a block of S before every step of a chunk
  float own[CHUNK], vdy[CHUNK];
  std::vector<const Sequence*> first_pass{&in.w, &in.k, &in.v}, all;

  explicit Backward(const BackwardArgs& args) : to(args) {
    if (DELTA) first_pass.insert(first_pass.end(), {&in.b, &to.q});
    all = first_pass;
    all.push_back(&in.a);
    if (DELTA) all.push_back(&in.r);
    const Gradients& g = to.grads;
    for (const auto* x : {&to.dy, &g.dr, &g.dw, &g.dk, &g.dv, &g.da, &g.db})
      if (*x) all.push_back(&**x);
  }

  // The gradients of r, w, k, a, b, u and the state for keys, and of v for values, of tiles first..last. What WKV-7's
  // keys need of the values, e, takes all tiles of the values: a quarter of the work, done again in each part.
  void run(int64_t bh, int64_t first, int64_t last) {
    load_keys(S, head_of(in.state, bh, in.N), in.N, first, last);
    for (int64_t c = 0; c + 1 < chunks; ++c) {
      load(bh, c, first, last);
      for (int64_t j = first; j < last; ++j)
        for (int64_t n = 0; n < rows; n += ROWS) {
          recall<false>(j, n, CHUNK, Block(start(j, c) + n)).store(start(j, c + 1) + n);
          ask(first_pass, bh, (c + 1) * CHUNK, (j - first) * rows + n, (last - first) * rows, ROWS);
        }
    }
    load_keys(GK, head_of(to.dlast, bh, in.N), in.N, first, last);
    load_values(GV, head_of(to.dlast, bh, in.N), in.N, 0, tiles);
    for (Tiles* x : {&p, &a_next, &sum_w, &sum_u}) std::fill(x->begin(), x->end(), Tile());
    std::fill_n(floats(d_next), tiles * TILE, 1.0f);
    if constexpr (!DELTA) in.load_u(u, bh);
    for (int64_t c = chunks - 1; c >= 0; --c) chunk(bh, c, first, last);
    if constexpr (!DELTA)
      for (auto [out, sum] : {std::pair<Tensor, Tiles*>(to.grads.sum_w, &sum_w), {to.grads.sum_u, &sum_u}}) {
        const int64_t from = first * TILE, n = std::min(last * TILE, in.N) - from;
        std::copy_n(floats(*sum) + from, n, out.template mutable_data_ptr<float>() + bh * in.N + from);
      }
    if (in.state) store_keys(to.dstate.mutable_data_ptr<float>() + bh * in.N * in.N, GK, in.N, first, last);
  }

  int64_t steps(int64_t c) const { return std::min<int64_t>(CHUNK, in.T - c * CHUNK); }
  Tile* start(int64_t j, int64_t c) { return &S[(c * tiles + j) * rows]; }

  // What the state needs, for keys of tiles first..last.
  void load(int64_t bh, int64_t c, int64_t first, int64_t last) {
    const int64_t t0 = c * CHUNK, n = steps(c);
    in.w.load(w, bh, t0, n, first, last);
    to_decay(d, w, n, first, last);
    in.k.load(k, bh, t0, n, first, last);
    in.v.load(v, bh, t0, n, 0, tiles);
    if constexpr (DELTA) {
      in.b.load(b, bh, t0, n, first, last);
      to.q.load(q, bh, t0, n, 0, tiles);
    }
  }

  void chunk(int64_t bh, int64_t c, int64_t first, int64_t last) {
    const int64_t t0 = c * CHUNK, n = steps(c);
    load(bh, c, 0, tiles);
    in.a.load(a, bh, t0, n, 0, tiles);
    if constexpr (DELTA) in.r.load(r, bh, t0, n, 0, tiles);
    if (to.dy) to.dy->load(dy, bh, t0, n, 0, tiles);
    if constexpr (DELTA) {
      for (int64_t j = 0; j < tiles; ++j) values(j, n);
      std::copy(&d.tile(0, 0), &d.tile(0, 0) + tiles, d_next.begin());
      std::copy(&a.tile(0, 0), &a.tile(0, 0) + tiles, a_next.begin());
    } else {
      for (int64_t t = 0; t < n; ++t) own[t] = dot(t, a, k, &u), vdy[t] = dot(t, v, dy);
      for (int64_t j = first; j < last; ++j)  // forward's recurrence with the roles exchanged
        for (int64_t i = 0; i < rows; i += ROWS) sweep(&GV[j * rows], i, j, n, -1, d, a, k, own, dy, dv);
    }
    for (int64_t j = first; j < last; ++j) {
      for (int64_t i = 0; i < rows; i += ROWS) {
        recall<true>(j, i, n, Block(start(j, c) + i));
        keys(j, i, n);
        ask(all, bh, t0 - CHUNK, (j - first) * rows + i, (last - first) * rows, ROWS);
      }
      finish(j, n);
    }
    const Gradients& g = to.grads;
    for (auto [out, rows] : {std::pair(&g.dr, &dr), {&g.dw, &dw}, {&g.dk, &dk}, {&g.dv, &dv}, {&g.da, &da},
                             {&g.db, &db}})
      if (*out) (*out)->store(*rows, bh, t0, n, first, last);
  }

  // WKV-7: back in time over a value tile, forward's recurrence with the roles exchanged.
  void values(int64_t j, int64_t n) {
    for (int64_t t = n - 1; t >= 0; --t) {
      const float* decay = t + 1 < n ? d[t + 1] : floats(d_next);
      const float* beta = t + 1 < n ? a[t + 1] : floats(a_next);
      step(&GV[j * rows], rows, decay, beta, r[t], k[t], b[t], p[j], dy.tile(t, j), dv.tile(t, j));
      e.tile(t, j) = p[j];
    }
  }

  // ROWS values, from n, of key tile j forward in time; KEEP: with what backward wants of these states.
  template <bool KEEP>
  Block recall(int64_t j, int64_t n, int64_t steps, Block X) {
    for (int64_t t = 0; t < steps; ++t) {
      const Tile d0 = d.tile(t, j), b0 = b.tile(t, j), k0 = k.tile(t, j);
      const float *vt = v[t] + n, *qt = q[t] + n, *et = e[t] + n, *dyt = dy[t] + n;
      Tile sum_a = n ? da.tile(t, j) : Tile(), sum_r = n ? dr.tile(t, j) : Tile();
      if constexpr (KEEP) X.store(past[t]);
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; ++m) {
        const Vec vm = lanes(vt[m]), qm = lanes(qt[m]), em = lanes(et[m]), dym = lanes(dyt[m]);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          Vec x = X.x[m][i] * d0.x[i] + k0.x[i] * vm;
          if constexpr (DELTA) x += b0.x[i] * qm;
          sum_a.x[i] += X.x[m][i] * em;
          sum_r.x[i] += x * dym;
          X.x[m][i] = x;
        }
      }
      if constexpr (KEEP) da.tile(t, j) = sum_a;
      if constexpr (KEEP && DELTA) dr.tile(t, j) = sum_r;
    }
    return X;
  }

  // The same values back in time.
  void keys(int64_t j, int64_t n, int64_t steps) {
    Block G(&GK[j * rows + n]);
    for (int64_t t = steps - 1; t >= 0; --t) {
      const Tile d0 = d.tile(t, j), a0 = a.tile(t, j), r0 = r.tile(t, j);
      const float *vt = v[t] + n, *qt = q[t] + n, *et = e[t] + n, *dyt = dy[t] + n;
      Tile sum_k = n ? dk.tile(t, j) : Tile(), sum_d = n ? dw.tile(t, j) : Tile(), sum_b = n ? db.tile(t, j) : Tile();
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; ++m) {
        const Vec vm = lanes(vt[m]), qm = lanes(qt[m]), em = lanes(et[m]), dym = lanes(dyt[m]);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          Vec g = G.x[m][i];
          if constexpr (DELTA) g += r0.x[i] * dym, sum_b.x[i] += g * qm;
          sum_k.x[i] += g * vm;
          sum_d.x[i] += g * past[t][m].x[i];
          G.x[m][i] = g * d0.x[i] + a0.x[i] * em;
        }
      }
      dk.tile(t, j) = sum_k, dw.tile(t, j) = sum_d;
      if constexpr (DELTA) db.tile(t, j) = sum_b;
    }
    G.store(&GK[j * rows + n]);
  }

  // From the gradients of decays to those of raw decays; and WKV-6's step's own k vᵀ.
  void finish(int64_t j, int64_t steps) {
    Tile chunk_w, chunk_u;
    for (int64_t t = 0; t < steps; ++t)
      for (int i = 0; i < 2; ++i) {
        Vec& dw0 = dw.tile(t, j).x[i];
        dw0 *= -d.tile(t, j).x[i] * w.tile(t, j).x[i];
        if constexpr (!DELTA) {
          const Vec k0 = k.tile(t, j).x[i] * vdy[t], a0 = a.tile(t, j).x[i];
          da.tile(t, j).x[i] += u[j].x[i] * k0;
          dk.tile(t, j).x[i] += u[j].x[i] * a0 * vdy[t];
          chunk_w.x[i] += dw0, chunk_u.x[i] += a0 * k0;
        }
      }
    for (int i = 0; i < 2; ++i) sum_w[j].x[i] += chunk_w.x[i], sum_u[j].x[i] += chunk_u.x[i];
  }
};

}  // namespace rwkv_nb
