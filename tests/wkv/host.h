// The kernels of cuda/*.cu on a CPU, for tests: every CUDA thread is a fiber of one thread, switched at barriers and
// shuffles. Whoever may run next is drawn at random, so that a barrier too few shows as a wrong number.
#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <setjmp.h>
#include <ucontext.h>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

using __nv_bfloat16 = c10::BFloat16;
using __half = c10::Half;
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline float __half2float(__half x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline int cudaGetLastError() { return 0; }

namespace host {

struct Index { int64_t x; };
struct Barrier { int waiting = 0, round = 0; };
struct Fiber { ucontext_t start; jmp_buf at; bool begun = false, done = false; std::vector<char> stack; };

inline std::vector<Fiber> fibers;
inline std::vector<float> slots[2];
inline std::vector<Barrier> warps;
inline std::vector<int> shuffles;
inline Barrier block;
inline int self;
inline jmp_buf scheduler;
inline const std::function<void()>* work;
inline std::mt19937 draw{0};

inline void pause() { if (!_setjmp(fibers[self].at)) _longjmp(scheduler, 1); }
inline void wait(Barrier& barrier, int threads) {
  const int round = barrier.round;
  if (++barrier.waiting == threads) barrier.waiting = 0, ++barrier.round;
  else while (barrier.round == round) pause();
}
inline void begin() {
  (*work)();
  fibers[self].done = true;
  _longjmp(scheduler, 1);
}

}  // namespace host

inline host::Index blockIdx, threadIdx;

inline void __syncthreads() { host::wait(host::block, static_cast<int>(host::fibers.size())); }
inline float __shfl_xor_sync(unsigned, float x, int far) {
  auto& slot = host::slots[host::shuffles[host::self]++ % 2];  // two in turn: one is read while the next is written
  slot[host::self] = x;
  host::wait(host::warps[host::self / 32], 32);
  return slot[host::self ^ far];
}
inline bool __any_sync(unsigned all, bool x) {
  float any = x;
  for (int far = 1; far < 32; far *= 2) any += __shfl_xor_sync(all, any, far);
  return any > 0;
}

namespace host {

inline void launch(int64_t blocks, int threads, const std::function<void()>& kernel) {
  fibers.resize(threads), warps.resize(threads / 32), shuffles.resize(threads);
  for (auto& slot : slots) slot.resize(threads);
  work = &kernel;
  std::vector<int> order(threads);
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = fibers[order[i] = i];
      fiber.begun = fiber.done = false;
      fiber.stack.resize(1 << 16);
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack.data();
      fiber.start.uc_stack.ss_size = fiber.stack.size();
      makecontext(&fiber.start, begin, 0);
    }
    while (!order.empty()) {
      std::swap(order[draw() % order.size()], order.back());
      for (size_t i = 0; i < order.size(); ++i) {
        threadIdx.x = self = order[i];
        if (_setjmp(scheduler)) continue;
        if (fibers[self].begun) _longjmp(fibers[self].at, 1);
        fibers[self].begun = true;
        setcontext(&fibers[self].start);
      }
      std::erase_if(order, [](int i) { return fibers[i].done; });
    }
    order.resize(threads);
  }
}

}  // namespace host

#define LAUNCH(blocks, threads, stream, kernel, ...) \
  ((void)(stream), host::launch(blocks, threads, [=] { kernel(__VA_ARGS__); }))
