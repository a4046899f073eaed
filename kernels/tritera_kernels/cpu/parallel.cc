// SPDX-License-Identifier: Apache-2.0
#include "parallel.h"

#include <time.h>

#include <algorithm>
#include <cstdint>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tritera {
namespace {

constexpr int kMaxWorkers = 64;
constexpr int kBits = 20;  // of a chunk's number
constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1;

// (phase, first chunk, one past the last) in one word: a helper that wakes up
// late cannot take a chunk of a phase it has not seen.
constexpr uint64_t word(uint64_t phase, uint64_t first, uint64_t last) {
  return phase << (2 * kBits) | first << kBits | last;
}

inline void relax(int& spins) {
  // Past some tens of microseconds the thread that is waited for has probably
  // lost its core to another process. A core that sleeps is given what waits
  // elsewhere; one that spins, or yields, is not: it would wait milliseconds.
  if (++spins > 2000) {
    const timespec pause{0, 20'000};
    nanosleep(&pause, nullptr);
    return;
  }
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

struct Team::State {
  struct alignas(64) Run {
    std::atomic<uint64_t> word{0};
  };
  const std::thread::id caller = std::this_thread::get_id();
  int workers;
  Run runs[kMaxWorkers];
  alignas(64) std::atomic<uint64_t> phase{0};
  alignas(64) std::atomic<int> left{0};
  std::atomic<bool> over{false};
  const std::function<void(int)>* f = nullptr;

  // Takes chunks of `phase` until none is left.
  void work(uint64_t phase, int me) {
    for (int other = 0; other < workers; ++other) {
      std::atomic<uint64_t>& run = runs[(me + other) % workers].word;
      uint64_t now = run.load(std::memory_order_acquire);
      for (;;) {
        const uint64_t first = now >> kBits & kMask, last = now & kMask;
        if (now >> (2 * kBits) != phase || first >= last) break;
        const uint64_t next = other ? word(phase, first, last - 1)
                                    : word(phase, first + 1, last);
        if (!run.compare_exchange_weak(now, next, std::memory_order_acq_rel))
          continue;
        // The phase cannot end before this chunk: f is that of the phase.
        (*f)(static_cast<int>(other ? last - 1 : first));
        left.fetch_sub(1, std::memory_order_release);
        now = run.load(std::memory_order_acquire);
      }
    }
  }

  void help(int me) {
    // A pool whose queue is full runs a task at once, in the caller.
    if (std::this_thread::get_id() == caller) return;
    uint64_t seen = 0;
    int spins = 0;
    while (!over.load(std::memory_order_acquire)) {
      const uint64_t now = phase.load(std::memory_order_acquire);
      if (now == seen) {
        relax(spins);
        continue;
      }
      seen = now;
      spins = 0;
      work(now, me);
    }
  }
};

Team::Team(const Helpers& helpers) : helpers_(helpers) {}

Team::~Team() {
  if (state_) state_->over.store(true, std::memory_order_release);
}

int Team::workers() const {
  return std::clamp(helpers_.threads, 0, kMaxWorkers - 1) + 1;
}

void Team::start() {
  state_ = std::make_shared<State>();
  state_->workers = workers();
  for (int i = 1; i < state_->workers; ++i) {
    helpers_.schedule([state = state_, i] { state->help(i); });
  }
}

void Team::run(int chunks, const std::function<void(int)>& f) {
  constexpr int kMost = kMask;  // that the word of a run can count
  for (; chunks > kMost; chunks -= kMost)
    run(kMost, [&](int chunk) { f(chunks - kMost + chunk); });
  if (chunks <= 1 || workers() == 1) {
    for (int i = 0; i < chunks; ++i) f(i);
    return;
  }
  if (!state_) start();
  State& state = *state_;
  const uint64_t phase = state.phase.load(std::memory_order_relaxed) + 1;
  const uint64_t workers = state.workers;
  state.f = &f;
  state.left.store(chunks, std::memory_order_relaxed);
  for (uint64_t i = 0; i < workers; ++i) {
    state.runs[i].word.store(
        word(phase, chunks * i / workers, chunks * (i + 1) / workers),
        std::memory_order_release);
  }
  state.phase.store(phase, std::memory_order_release);
  state.work(phase, 0);
  int spins = 0;
  while (state.left.load(std::memory_order_acquire) > 0) relax(spins);
}

}  // namespace tritera
