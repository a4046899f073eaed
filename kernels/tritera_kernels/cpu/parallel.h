// SPDX-License-Identifier: Apache-2.0
// Chunks of work shared between the calling thread and helper tasks.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <vector>

namespace tritera {

// Threads that may help; XLA's pool, or the test harness's.
struct Helpers {
  int threads = 0;  // that run beside the caller
  std::function<void(std::function<void()>)> schedule;
};

// The caller and its helpers, for the phases of one call.
//
// A helper task may start late or never: the caller takes every chunk that is
// left and waits only for chunks that another thread is in the middle of. So a
// full pool cannot deadlock, and a preempted helper costs its own chunk.
//
// Each worker has its own run of chunks, front to back, so that prefetching
// past a chunk helps the same core; when it is done it steals from the back of
// the others'.
class Team {
 public:
  explicit Team(const Helpers& helpers);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int workers() const;

  // Calls f(chunk) for every chunk in 0 .. chunks - 1, on any of the threads;
  // returns when all are done.
  void run(int chunks, const std::function<void(int)>& f);

 private:
  struct State;
  void start();
  const Helpers& helpers_;
  std::shared_ptr<State> state_;
};

}  // namespace tritera
