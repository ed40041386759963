// SPDX-License-Identifier: Apache-2.0
// Tasks on torch's thread pool, memory that threads keep between calls, and how small a piece of work may be.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#elif defined(__SANITIZE_THREAD__)
#include <thread>
#endif

namespace lifeops {

constexpr int64_t kGrainBytes = 32768;  // less work than this is not worth a second thread

// f(t) for 0 <= t < threads on torch's pool. ThreadSanitizer cannot see how that one waits (libgomp): there threads are started and joined.
template <class F> void on_threads(int64_t threads, const F& f) {
#if defined(__SANITIZE_THREAD__)
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; ++t) others.emplace_back([&f, t] { f(t); });
  if (threads > 0) f(0);
  for (std::thread& other : others) other.join();
#else
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) f(t);
  });
#endif
}

// f(i) for 0 <= i < n, at least `grain` of them per thread. Every thread starts with its even share, in order, and then takes from
// the others': cores are not equally fast where something else uses them too. What a task computes must not depend on who runs it.
// `backwards`: each share from its end, where a pass just before has left its last data in the caches.
template <class F> void for_each_task(int64_t n, int64_t grain, const F& f, bool backwards = false) {
  const int64_t shares = (n + grain - 1) / grain, pool = int64_t(torch::stable::get_num_threads()), threads = shares < pool ? shares : pool;
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const std::unique_ptr<Share[]> share(new Share[size_t(threads > 1 ? threads : 1)]);
  for (int64_t t = 0; t < threads; ++t) share[size_t(t)].next = t * n / threads, share[size_t(t)].end = (t + 1) * n / threads;
  on_threads(threads, [&](int64_t t) {
    for (int64_t k = 0; k < threads; ++k) {
      const int64_t s = (t + k) % threads;
      Share& from = share[size_t(s)];
      for (int64_t i; (i = from.next.fetch_add(1, std::memory_order_relaxed)) < from.end;) f(backwards ? s * n / threads + from.end - 1 - i : i);
    }
  });
}

// Cache-line aligned memory that a thread keeps between calls.
class Scratch {
 public:
  void* get(int64_t bytes) {
    if (bytes > int64_t(storage_.size()) - kAlign) storage_ = std::vector<char>(size_t(bytes + kAlign));
    const auto address = reinterpret_cast<uintptr_t>(storage_.data());
    void* const found = reinterpret_cast<void*>((address + kAlign - 1) / kAlign * kAlign);
#if defined(__SANITIZE_ADDRESS__)  // what was not asked for is not to be touched, although it is there
    ASAN_POISON_MEMORY_REGION(storage_.data(), storage_.size());
    ASAN_UNPOISON_MEMORY_REGION(found, size_t(bytes));
#endif
    return found;
  }

 private:
  static constexpr int64_t kAlign = 64;
  std::vector<char> storage_;
};

}  // namespace lifeops
