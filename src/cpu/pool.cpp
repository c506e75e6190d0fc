// SPDX-License-Identifier: Apache-2.0
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>

#include "baracuda/api.h"
#include "baracuda/float_environment.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace bcy::cpu {
namespace {

constexpr int kMaxThreads = 1024;
constexpr auto kSpin = std::chrono::microseconds(50);

void relax() {
#ifdef __x86_64__
  _mm_pause();
#endif
}

// Until ready() or for a short while: waking a thread costs more than most products take.
template <class Ready>
bool spin(Ready ready) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return ready();
}

int count_cpus() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
  return int(std::thread::hardware_concurrency());  // more CPUs than cpu_set_t has
}

// One call of run_parallel, on its caller's stack. The pool's mutex guards what is not atomic.
struct Job {
  const Work work;
  void* const context;
  const int64_t count;
  const int64_t grain;
  const int threads;
  int seats = threads - 1;  // workers that may still join
  std::atomic<int64_t> next{0};
  std::atomic<int> inside{0};  // workers at it
  std::atomic<bool> failed{false};
  std::condition_variable done;
  Job* after = nullptr;

  Job(int64_t count, int64_t grain, int threads, Work work, void* context)
      : work(work), context(context), count(count), grain(grain), threads(threads) {}

  bool take(int64_t* begin, int64_t* end) {
    int64_t at = next.load(std::memory_order_relaxed);
    int64_t size;
    do {
      const int64_t left = count - at;
      if (left <= 0) return false;
      const int64_t share = threads > 1 ? left / (4 * threads) : left;
      size = (share / grain + 1) * grain;
      if (size > left) size = left;
    } while (!next.compare_exchange_weak(at, at + size, std::memory_order_relaxed));
    *begin = at;
    *end = at + size;
    return true;
  }
  void run() noexcept {
    const FloatEnvironment environment;
    int64_t begin, end;
    while (take(&begin, &end)) {
      try {
        work(context, begin, end);
      } catch (...) {
        failed.store(true, std::memory_order_relaxed);
        return;
      }
    }
  }
  bool wants_workers() const { return seats > 0 && next.load(std::memory_order_relaxed) < count; }
};

class Pool {
 public:
  int default_threads() const { return default_threads_; }

  int run(Job* job) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (workers_ < job->threads - 1 && start_worker()) {
      }
      job->after = jobs_;
      jobs_ = job;
      submitted_.fetch_add(1, std::memory_order_release);
      const int asleep = asleep_ < job->seats ? asleep_ : job->seats;
      for (int i = 0; i < asleep; ++i) wake_.notify_one();
    }
    job->run();
    std::unique_lock<std::mutex> lock(mutex_);
    for (Job** at = &jobs_; *at; at = &(*at)->after) {
      if (*at == job) {
        *at = job->after;
        break;
      }
    }
    if (job->inside.load(std::memory_order_relaxed) > 0) {
      lock.unlock();
      spin([job] { return job->inside.load(std::memory_order_acquire) == 0; });
      lock.lock();  // the last worker holds it until it is through with the job
      job->done.wait(lock, [job] { return job->inside.load(std::memory_order_relaxed) == 0; });
    }
    return job->failed.load(std::memory_order_relaxed) ? BCY_ERROR_OUT_OF_MEMORY : BCY_OK;
  }

 private:
  bool start_worker() {
    // Signals belong to the program's own threads.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool started = true;
    try {
      std::thread([this] { serve(); }).detach();
      ++workers_;
    } catch (...) {
      started = false;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return started;
  }

  Job* find() const {
    for (Job* job = jobs_; job; job = job->after) {
      if (job->wants_workers()) return job;
    }
    return nullptr;
  }

  [[noreturn]] void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      Job* job = find();
      if (!job && workers_ < cpus_) {  // with more threads than CPUs, spinning delays who works
        const uint64_t seen = submitted_.load(std::memory_order_relaxed);
        lock.unlock();
        spin([this, seen] { return submitted_.load(std::memory_order_acquire) != seen; });
        lock.lock();
        job = find();
      }
      while (!job) {
        ++asleep_;
        wake_.wait(lock);
        --asleep_;
        job = find();
      }
      --job->seats;
      job->inside.fetch_add(1, std::memory_order_relaxed);
      lock.unlock();
      job->run();
      lock.lock();
      if (job->inside.fetch_sub(1, std::memory_order_release) == 1) job->done.notify_one();
    }
  }

  static int threads_wanted(int cpus) {
    if (const char* text = getenv("BARACUDA_THREADS")) {
      char* end;
      const long asked = strtol(text, &end, 10);
      if (end != text && *end == '\0' && asked > 0 && asked <= kMaxThreads) return int(asked);
    }
    return cpus;
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  Job* jobs_ = nullptr;
  int workers_ = 0;
  int asleep_ = 0;
  std::atomic<uint64_t> submitted_{0};
  const int cpus_ = count_cpus() > 0 ? count_cpus() : 1;
  const int default_threads_ = threads_wanted(cpus_);
};

// Never destroyed: its threads sleep in it while the process exits. A child of fork() has none of
// the threads and perhaps a locked mutex, so it starts over.
alignas(Pool) unsigned char storage[sizeof(Pool)];

void start_over() { new (storage) Pool(); }

Pool& pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    start_over();
    pthread_atfork(nullptr, nullptr, start_over);
  });
  return *std::launder(reinterpret_cast<Pool*>(storage));
}

}  // namespace

int default_threads() { return pool().default_threads(); }

int run_parallel(int64_t count, int64_t grain, int threads, Work work, void* context) {
  if (count <= 0) return BCY_OK;
  if (grain < 1) grain = 1;
  if (threads <= 0) threads = default_threads();
  const int64_t pieces = (count - 1) / grain + 1;
  if (threads > kMaxThreads) threads = kMaxThreads;
  if (threads > pieces) threads = int(pieces);
  Job job(count, grain, threads, work, context);
  if (threads > 1) return pool().run(&job);
  job.run();
  return job.failed ? BCY_ERROR_OUT_OF_MEMORY : BCY_OK;
}

}  // namespace bcy::cpu
