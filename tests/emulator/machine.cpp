// SPDX-License-Identifier: Apache-2.0
#include "machine.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

namespace emulator {

thread_local const Thread* this_thread;

namespace {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kPage = 4096;
constexpr size_t kBoundary = 16;  // of shared memory, as the host sees it

// As the hardware has it, in the 64 bits that the program gives it.
struct Barrier {
  uint64_t phase : 1, expected : 20, pending : 20;
  int64_t bytes : 23;  // still to come; copies may be done before they are announced

  void settle() {
    if (pending > 0 || bytes != 0) return;
    phase ^= 1;
    pending = expected;
  }
};
static_assert(sizeof(Barrier) == sizeof(uint64_t));

struct Fiber {
  Thread thread;
  jmp_buf state;
  bool started = false;
  uint64_t turn = 0;
  std::vector<std::function<void()>> copies;  // of its own, not yet promised to a barrier
};

// Memory that ends where a page does that must not be touched, and holds 0xff until it is written.
class Shared {
 public:
  explicit Shared(size_t bytes)
      : room_((bytes + kBoundary - 1) / kBoundary * kBoundary),
        mapped_((room_ + 2 * kPage - 1) / kPage * kPage) {
    void* const pages =
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) abort();
    end_ = static_cast<uint8_t*>(pages) + mapped_ - kPage;
    mprotect(end_, kPage, PROT_NONE);
    memset(start(), 0xff, room_);
  }
  ~Shared() { munmap(end_ + kPage - mapped_, mapped_); }
  Shared(const Shared&) = delete;
  Shared& operator=(const Shared&) = delete;
  uint8_t* start() const { return end_ - room_; }

 private:
  size_t room_, mapped_;
  uint8_t* end_;
};

// Stacks are kept for the blocks to come. A thread that returns leaves its own to the next one.
class Stacks {
 public:
  ~Stacks() {
    for (void* stack : all_) munmap(stack, kStackBytes);
  }
  void clear() { used_ = 0; }
  void* take() {
    if (used_ == all_.size()) {
      void* const stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stack == MAP_FAILED) abort();
      mprotect(stack, kPage, PROT_NONE);
      all_.push_back(stack);
    }
    return all_[used_++];
  }

 private:
  std::vector<void*> all_;
  size_t used_ = 0;
};
thread_local Stacks stacks;

struct Warp {
  Operands operands[2][kLanes];  // by turns: a lane may be at the next instruction already
  const char* instruction = nullptr;
  int line = 0;
  int arrived = 0, exited = 0;
  unsigned turn = 0;
};

// Threads that wait for a number of them.
struct Meeting {
  int arrived = 0;
  std::vector<Fiber*> waiting;
};

struct Waiter {
  Fiber* fiber;
  uint32_t barrier;
  uint32_t parity;
};

// A kernel that was launched, and the one ahead of it where it need not wait for its end.
struct Kernel {
  Launch launch;
  std::function<void()> threads;
  uint64_t seed;
  std::unique_ptr<Kernel> previous;

  Kernel(const Launch& launch, std::function<void()> threads, uint64_t seed)
      : launch(launch), threads(std::move(threads)), seed(seed) {}

  void run();
  void run_previous() {
    // What waits is a fiber of this thread.
    if (const auto kernel = std::move(previous)) std::thread([&] { kernel->run(); }).join();
  }
};

class Block;
thread_local Block* this_block;

class Block {
 public:
  Block(Kernel& kernel, Index index, uint64_t seed)
      : kernel_(kernel),
        random_(seed),
        fair_(random_() % 2),
        eager_(random_() % 3),
        shared_bytes_(kernel.launch.shared_bytes),
        memory_(shared_bytes_),
        shared_(memory_.start()) {
    const size_t threads = kernel.launch.block.x;
    fibers_.resize(threads);
    warps_.resize((threads + kLanes - 1) / kLanes);
    for (size_t i = 0; i < threads; ++i) {
      fibers_[i].thread = {{unsigned(i), 0, 0}, index, kernel.launch.grid};
      make_ready(&fibers_[i]);
    }
  }

  // Whether it came to its end.
  bool run() {
    this_block = this;
    stacks.clear();
    if (_setjmp(finished_) == 0) resume(pick());
    this_block = nullptr;
    this_thread = nullptr;
    return !failed_;
  }

  const Operands* meet_warp(const char* instruction, int line, const Operands& mine) {
    const int thread = current_->thread.thread.x;
    Warp& warp = warps_[thread / kLanes];
    if (warp.exited > 0) fail("%s: a lane of the warp has returned", instruction);
    if (warp.arrived == 0) {
      warp.instruction = instruction;
      warp.line = line;
    } else if (strcmp(warp.instruction, instruction) != 0 || warp.line != line) {
      fail("lanes of a warp are at %s, line %d, and at %s, line %d", warp.instruction, warp.line,
           instruction, line);
    }
    Operands* const all = warp.operands[warp.turn % 2];
    all[thread % kLanes] = mine;
    if (++warp.arrived < kLanes) {
      wait();
      return all;
    }
    warp.arrived = 0;
    ++warp.turn;
    for (int lane = 0; lane < kLanes; ++lane) {
      Fiber& fiber = fibers_[thread / kLanes * kLanes + lane];
      if (&fiber != current_) make_ready(&fiber);
    }
    maybe_copy();
    return all;
  }

  void sync(int barrier, int threads) {
    Meeting& meeting = meetings_[barrier];
    if (++meeting.arrived < threads) {
      meeting.waiting.push_back(current_);
      wait();
      return;
    }
    meeting.arrived = 0;
    for (Fiber* const fiber : meeting.waiting) make_ready(fiber);
    meeting.waiting.clear();
  }
  int threads() const { return int(fibers_.size()); }

  uint8_t* shared() const { return shared_; }
  Kernel& kernel() const { return kernel_; }
  Fiber& current() const { return *current_; }

  uint32_t offset_of(const void* p) const {
    const auto* const byte = static_cast<const uint8_t*>(p);
    if (byte < shared_ || byte >= shared_ + shared_bytes_) fail("not an address of shared memory");
    return uint32_t(byte - shared_);
  }
  uint8_t* at(uint32_t address) const {
    if (address >= shared_bytes_) fail("an offset beyond shared memory");
    return shared_ + address;
  }
  Barrier* barrier(uint32_t address) const {
    if (address % sizeof(Barrier) != 0) fail("a barrier off its boundary");
    return reinterpret_cast<Barrier*>(at(address));
  }

  void wait_for(uint32_t address, uint32_t parity) {
    if (passed(address, parity)) return;
    waiters_.push_back({current_, address, parity});
    wait();
  }

  void start(std::function<void()> copy) {
    if (random_() % 2 < eager_) {
      copy();
    } else {
      copies_.push_back(std::move(copy));
    }
  }

  [[noreturn]] void leave() {
    failed_ = true;
    _longjmp(finished_, 1);
  }

 private:
  bool passed(uint32_t address, uint32_t parity) const {
    return barrier(address)->phase != (parity & 1);
  }

  // The running thread gives way until something makes it ready.
  void wait() {
    Fiber* const next = pick();
    if (next == current_) return;
    if (_setjmp(current_->state) == 0) resume(next);
  }

  // Either draws lots each time, or some threads are behind the others for long.
  void make_ready(Fiber* fiber) {
    if (fiber->turn == 0 || random_() % (fair_ ? 1 : 256) == 0) fiber->turn = random_();
    ready_.push_back(fiber);
    std::push_heap(ready_.begin(), ready_.end(), later_than);
  }
  static bool later_than(const Fiber* a, const Fiber* b) { return a->turn > b->turn; }

  void look_at_barriers() {
    for (size_t i = 0; i < waiters_.size();) {
      if (passed(waiters_[i].barrier, waiters_[i].parity)) {
        make_ready(waiters_[i].fiber);
        waiters_[i] = waiters_.back();
        waiters_.pop_back();
      } else {
        ++i;
      }
    }
  }

  Fiber* pick() {
    maybe_copy();
    if (random_() % 16 == 0) look_at_barriers();
    for (;;) {
      if (!ready_.empty()) {
        std::pop_heap(ready_.begin(), ready_.end(), later_than);
        Fiber* const next = ready_.back();
        ready_.pop_back();
        return next;
      }
      look_at_barriers();
      if (!ready_.empty()) continue;
      if (!copies_.empty()) {
        copy_one();
      } else if (finished_count_ == fibers_.size()) {
        _longjmp(finished_, 1);
      } else {
        fail("all threads wait: %zu of %zu have returned, %zu are at barriers", finished_count_,
             fibers_.size(), waiters_.size());
      }
    }
  }

  void maybe_copy() {
    if (!copies_.empty() && eager_ > 0 && random_() % 8 == 0) copy_one();
  }
  void copy_one() {
    std::swap(copies_[random_() % copies_.size()], copies_.back());
    const auto copy = std::move(copies_.back());
    copies_.pop_back();
    copy();
  }

  [[noreturn]] void resume(Fiber* fiber) {
    const bool started = fiber->started;
    make_current(fiber);
    if (started) _longjmp(fiber->state, 1);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks.take();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, &Block::enter, 0);
    setcontext(&context);
    abort();
  }

  void make_current(Fiber* fiber) {
    current_ = fiber;
    this_thread = &fiber->thread;
    fiber->started = true;
  }

  static void enter() { this_block->run_threads(); }

  void run_threads() {
    for (;;) {
      kernel_.threads();
      if (!current_->copies.empty()) fail("a thread returned with copies that nothing waits for");
      Warp& warp = warps_[current_->thread.thread.x / kLanes];
      ++warp.exited;
      if (warp.arrived > 0) fail("%s: a lane of the warp has returned", warp.instruction);
      ++finished_count_;
      Fiber* const next = pick();
      if (next->started) resume(next);
      make_current(next);
    }
  }

  Kernel& kernel_;
  std::mt19937_64 random_;
  bool fair_;       // to threads
  unsigned eager_;  // of 2: how many copies are made at once
  size_t shared_bytes_;
  Shared memory_;
  uint8_t* shared_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<Fiber*> ready_;
  Meeting meetings_[16];
  std::vector<Waiter> waiters_;
  std::vector<std::function<void()>> copies_;
  Fiber* current_ = nullptr;
  size_t finished_count_ = 0;
  bool failed_ = false;
  jmp_buf finished_;
};

void arrive(Block& block, uint32_t address, uint32_t expected_bytes) {
  Barrier* const barrier = block.barrier(address);
  if (barrier->pending == 0) fail("more arrivals at a barrier than it counts");
  barrier->bytes += expected_bytes;
  barrier->pending -= 1;
  barrier->settle();
}

void complete(Block& block, uint32_t address, uint32_t bytes) {
  Barrier* const barrier = block.barrier(address);
  barrier->bytes -= bytes;
  barrier->settle();
}

}  // namespace

void fail(const char* format, ...) {
  const Index thread = this_thread ? this_thread->thread : Index{};
  const Index block = this_thread ? this_thread->block : Index{};
  fprintf(stderr, "emulated GPU: block %u, thread %u: ", block.x, thread.x);
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fputc('\n', stderr);
  if (this_block == nullptr) abort();
  this_block->leave();
}

uint8_t* dynamic_shared() { return this_block->shared(); }

const Operands* meet_warp(const char* instruction, int line, const Operands& mine) {
  return this_block->meet_warp(instruction, line, mine);
}
void sync_block() { this_block->sync(0, this_block->threads()); }
void sync_named(int barrier, int threads) { this_block->sync(barrier, threads); }

uint32_t shared_address(const void* p) { return this_block->offset_of(p); }
uint8_t* shared_pointer(uint32_t address) { return this_block->at(address); }

void barrier_init(uint32_t barrier, int arrivals) {
  *this_block->barrier(barrier) = {0, uint64_t(arrivals), uint64_t(arrivals), 0};
}
void barrier_arrive(uint32_t barrier, uint32_t expected_bytes) {
  arrive(*this_block, barrier, expected_bytes);
}
void barrier_wait(uint32_t barrier, uint32_t parity) { this_block->wait_for(barrier, parity); }

void copy_async(std::function<void()> copy, uint32_t barrier, uint32_t bytes) {
  Block& block = *this_block;
  auto whole = [&block, copy = std::move(copy), barrier, bytes] {
    copy();
    complete(block, barrier, bytes);
  };
  block.start(std::move(whole));
}

void copy_own(std::function<void()> copy) {
  this_block->current().copies.push_back(std::move(copy));
}

void arrive_after_copies(uint32_t barrier) {
  Block& block = *this_block;
  auto whole = [&block, copies = std::move(block.current().copies), barrier] {
    for (const auto& copy : copies) copy();
    arrive(block, barrier, 0);
  };
  block.current().copies.clear();
  block.start(std::move(whole));
}

// Launches of several threads take turns, first come, first served: the machine is one.
class Turn {
 public:
  Turn() {
    std::unique_lock<std::mutex> lock(mutex_);
    const uint64_t mine = last_++;
    next_.wait(lock, [&] { return serving_ == mine; });
  }
  ~Turn() {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++serving_;
    next_.notify_all();
  }

 private:
  static std::mutex mutex_;
  static std::condition_variable next_;
  static uint64_t last_, serving_;
};
std::mutex Turn::mutex_;
std::condition_variable Turn::next_;
uint64_t Turn::last_ = 0, Turn::serving_ = 0;

std::unique_ptr<Kernel> last;  // launched, not run
bool failed = false;

void Kernel::run() {
  std::mt19937_64 random(seed);
  std::vector<unsigned> blocks(launch.grid.x);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = unsigned(i);
  std::shuffle(blocks.begin(), blocks.end(), random);
  for (const unsigned i : blocks) {
    if (Block(*this, {i, 0, 0}, random()).run()) continue;
    failed = true;
    break;
  }
  run_previous();
}

void run_last() {
  if (const auto kernel = std::move(last)) kernel->run();
}

bool launch(const Launch& launch, std::function<void()> threads) {
  static const char* const given = getenv("BARACUDA_EMULATOR_SEED");
  static std::mt19937_64 random(given ? strtoull(given, nullptr, 10) : 0);
  const Turn turn;
  // Chains end now and then: all kernels of one may be under way.
  const bool overlaps = launch.early && last && last->launch.stream == launch.stream;
  if (!overlaps || random() % 4 == 0) run_last();
  auto kernel = std::make_unique<Kernel>(launch, std::move(threads), random());
  kernel->previous = std::move(last);
  last = std::move(kernel);
  return !failed;
}

bool finish() {
  const Turn turn;
  run_last();
  return !failed;
}

void wait_for_previous_kernel() { this_block->kernel().run_previous(); }

}  // namespace emulator
