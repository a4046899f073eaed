// SPDX-License-Identifier: Apache-2.0
// The team of parallel.h with threads as helpers: late, absent, too many.
#include <atomic>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "harness.h"
#include "parallel.h"
#include "pool.h"

namespace {

using testing::Pool;

// Phases of random numbers of chunks, each chunk writing plain memory that the
// caller and the chunks of the next phase read.
long phases(const tritera::Helpers& helpers, int count, int most,
            unsigned seed) {
  tritera::Team team(helpers);
  std::minstd_rand random(seed);
  std::vector<long> before(most, 0), now(most, 0);
  long wrong = 0;
  for (int phase = 0; phase < count; ++phase) {
    const int chunks = random() % (most + 1);
    const int work = random() % 64;
    const std::vector<long> old = now;
    team.run(chunks, [&](int chunk) {
      long spin = before[(chunk + 1) % most];
      for (int i = 0; i < work; ++i) spin += i;
      volatile long sink = spin;
      (void)sink;
      now[chunk] += chunk + phase;
    });
    for (int i = 0; i < most; ++i)
      wrong += now[i] != old[i] + (i < chunks ? i + phase : 0);
    before = now;
  }
  return wrong;
}

}  // namespace

bool test_team(int scale) {
  struct Case {
    const char* what;
    int pool, threads, delay_us, count, most;
  };
  const Case cases[] = {
      {"no helpers", 0, 0, 0, 100, 40},
      {"one helper", 1, 1, 0, 4000, 40},
      {"more threads than cores", 7, 7, 0, 400, 300},
      {"late helpers", 3, 3, 3000, 1000, 30},
      {"more tasks than threads", 1, 5, 500, 1000, 50},
      {"helpers that never start", 0, 3, 0, 1000, 50},
      {"more helpers than a team takes", 2, 100, 0, 20, 500},
      {"fewer helpers than none", 0, -1, 0, 100, 40},
  };
  bool good = true;
  for (const Case& c : cases) {
    long wrong = 0;
    for (int i = 0; i < 4; ++i) {
      Pool pool(c.pool, c.delay_us);
      wrong += phases(pool.helpers(c.threads), c.count * scale, c.most, i + 1);
    }
    std::printf("team: %-32s %s\n", c.what, wrong ? "WRONG" : "ok");
    good = good && wrong == 0;
  }
  const tritera::Helpers full{3, [](std::function<void()> task) { task(); }};
  const long in_caller = phases(full, 100, 40, 1);
  std::printf("team: %-32s %s\n", "a pool that runs tasks at once",
              in_caller ? "WRONG" : "ok");
  // More chunks than a run's word counts.
  std::atomic<long> sum{0};
  const int chunks = (2 << 20) + 5;
  {
    Pool pool(1, 0);
    const tritera::Helpers helpers = pool.helpers(1);
    tritera::Team(helpers).run(chunks, [&sum](int chunk) { sum += chunk; });
  }
  const bool many = sum == long{chunks} * (chunks - 1) / 2;
  std::printf("team: %-32s %s\n", "millions of chunks", many ? "ok" : "WRONG");
  good = good && !in_caller && many;
  // Many calls at the same time on one small pool.
  std::atomic<long> wrong{0};
  {
    Pool pool(2, 100);
    std::vector<std::thread> callers;
    for (int i = 0; i < 4; ++i) {
      callers.emplace_back([&pool, &wrong, i, scale] {
        for (int call = 0; call < 50 * scale; ++call)
          wrong += phases(pool.helpers(2), 10, 20, 100 * i + call + 1);
      });
    }
    for (std::thread& caller : callers) caller.join();
  }
  std::printf("team: %-32s %s\n", "four callers, one pool",
              wrong ? "WRONG" : "ok");
  return good && wrong == 0;
}
