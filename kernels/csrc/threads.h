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

class Pool {
 public:
  void run(int64_t count, int threads, const std::function<void(int64_t)> &body) {
    Job job{body, count, int(std::min<int64_t>(threads, count)) - 1};
    std::unique_lock<std::mutex> lock(mutex_);
    for (; workers_ < job.open_places; ++workers_) std::thread([this] { work(); }).detach();
    const auto place = jobs_.insert(jobs_.end(), &job);
    lock.unlock();
    wake_.notify_all();
    job.drain();
    lock.lock();
    jobs_.erase(place);
    done_.wait(lock, [&] { return job.helpers == 0; });
  }

 private:
  struct Job {
    const std::function<void(int64_t)> &body;
    int64_t count;
    int open_places;
    int helpers = 0;
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
      Job *job = nullptr;
      wake_.wait(lock, [&] { return (job = open_job()) != nullptr; });
      --job->open_places;
      ++job->helpers;
      lock.unlock();
      job->drain();
      lock.lock();
      if (--job->helpers == 0) done_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::list<Job *> jobs_;
  int workers_ = 0;
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
