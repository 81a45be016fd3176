// A small thread pool. The caller works too and helpers only join, so it never waits for a thread that is
// not there: two Python threads may call at once, and a forked child starts with a fresh pool.
#pragma once
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <list>
#include <mutex>
#include <thread>

namespace {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class Pool {
 public:
  void run(int64_t count, int threads, const std::function<void(int64_t)> &body) {
    Job job{body, count, int(std::min<int64_t>(threads, count)) - 1};
    std::unique_lock<std::mutex> lock(mutex_);
    for (; workers_ < job.open_places; ++workers_) std::thread([this] { work(); }).detach();
    const auto place = jobs_.insert(jobs_.end(), &job);
    announced_.fetch_add(1, std::memory_order_release);
    const bool wake = sleeping_ > 0;
    lock.unlock();
    if (wake) wake_.notify_all();
    job.drain();
    lock.lock();
    jobs_.erase(place);
    lock.unlock();
    for (int spins = 0; job.helpers.load(std::memory_order_acquire) > 0; ++spins)  // each on its last item
      spins < kSpins ? relax() : std::this_thread::yield();
  }

 private:
  // A helper without work looks for the next job this often before it sleeps, some tens of microseconds: a
  // model's step is hundreds of jobs with little between them, and waking a sleeper costs more than most.
  static constexpr int kSpins = 2000;

  struct Job {
    const std::function<void(int64_t)> &body;
    int64_t count;
    int open_places;
    std::atomic<int> helpers{0};
    std::atomic<int64_t> next{0};
    void drain() {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i);
    }
  };

  Job *open_job() {
    for (Job *job : jobs_)
      if (job->open_places > 0) return job;
    return nullptr;
  }

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      if (Job *job = open_job()) {
        --job->open_places;
        job->helpers.fetch_add(1, std::memory_order_relaxed);
        lock.unlock();
        job->drain();
        job->helpers.fetch_sub(1, std::memory_order_release);  // the job may be gone from here on
        lock.lock();
        continue;
      }
      const uint64_t seen = announced_.load(std::memory_order_relaxed);
      lock.unlock();
      for (int i = 0; i < kSpins && announced_.load(std::memory_order_relaxed) == seen; ++i) relax();
      lock.lock();
      ++sleeping_;
      wake_.wait(lock, [&] { return announced_.load(std::memory_order_relaxed) != seen; });
      --sleeping_;
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::list<Job *> jobs_;
  std::atomic<uint64_t> announced_{0};
  int workers_ = 0, sleeping_ = 0;
};

// Never destroyed: workers may outlive static destructors.
Pool *&pool() {
  static Pool *instance = [] {
    pthread_atfork(nullptr, nullptr, [] { pool() = new Pool; });
    return new Pool;
  }();
  return instance;
}

// body(0..count-1) on up to `threads` threads, in no particular order. Results must not depend on it.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)> &body) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
  } else {
    pool()->run(count, threads, body);
  }
}

}  // namespace
