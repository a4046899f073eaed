// SPDX-License-Identifier: Apache-2.0
// Threads as helpers: late, absent, too many.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "parallel.h"

namespace testing {

// Runs tasks on `threads` threads, each after a random delay of up to
// `delay_us`; on none of them where threads = 0: then they run at the end.
class Pool {
 public:
  Pool(int threads, int delay_us) {
    for (int i = 0; i < threads; ++i)
      threads_.emplace_back([this, i, delay_us] { loop(i, delay_us); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closed_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    while (!tasks_.empty()) {
      tasks_.front()();
      tasks_.pop_front();
    }
  }
  void schedule(std::function<void()> task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    wake_.notify_one();
  }
  // `threads` is what a team is told.
  tritera::Helpers helpers(int threads) {
    return {threads, [this](std::function<void()> task) {
              schedule(std::move(task));
            }};
  }

 private:
  void loop(int seed, int delay_us) {
    std::minstd_rand random(seed + 1);
    for (;;) {
      std::function<void()> task;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this] { return closed_ || !tasks_.empty(); });
        if (tasks_.empty()) return;
        task = std::move(tasks_.front());
        tasks_.pop_front();
      }
      if (delay_us > 0) {
        std::this_thread::sleep_for(
            std::chrono::microseconds(random() % delay_us));
      }
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> tasks_;
  std::vector<std::thread> threads_;
  bool closed_ = false;
};

}  // namespace testing
