#include "parallel.h"

#include <setjmp.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

#include "hands.h"

namespace fastmerge {
namespace {

constexpr auto BREATH = std::chrono::milliseconds(50);  // between ticks

// Reading a mapped page past the end of a cut file raises SIGBUS in the reading thread. A worker leaves its item by a
// jump: kernels own nothing, so nothing is left behind. Anyone else's SIGBUS goes where it went before.
thread_local sigjmp_buf* guarded = nullptr;
struct sigaction other_bus_action;

void on_bus(int signal, siginfo_t* info, void* context) {
  if (guarded) siglongjmp(*guarded, 1);
  if (other_bus_action.sa_flags & SA_SIGINFO) return other_bus_action.sa_sigaction(signal, info, context);
  if (other_bus_action.sa_handler != SIG_DFL && other_bus_action.sa_handler != SIG_IGN) {
    return other_bus_action.sa_handler(signal);
  }
  sigaction(SIGBUS, &other_bus_action, nullptr);  // the fault repeats, now with its default action
}

void guard_against_cut_files() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action = {};
    action.sa_sigaction = on_bus;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGBUS, &action, &other_bus_action);
  });
}

// Whoever stands between the system and on_bus, as sanitizers do, may block signals until it returns, which it does
// not.
void take_bus_again() {
  sigset_t bus;
  sigemptyset(&bus);
  sigaddset(&bus, SIGBUS);
  pthread_sigmask(SIG_UNBLOCK, &bus, nullptr);
}

int64_t guarded_work(const Work& work, int64_t item, char* scratch) {
  sigjmp_buf start;
  if (sigsetjmp(start, 0)) {
    guarded = nullptr;
    take_bus_again();
    throw InputCut();
  }
  guarded = &start;
  try {
    const int64_t bytes = work(item, scratch);
    guarded = nullptr;
    return bytes;
  } catch (...) {
    guarded = nullptr;
    throw;
  }
}

struct Block {
  explicit Block(size_t bytes) : start(static_cast<char*>(std::aligned_alloc(64, (bytes + 127) / 64 * 64))) {
    if (!start) throw std::bad_alloc();
  }
  ~Block() { std::free(start); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  char* start;
};

// The default floating-point environment, for as long as this lives: the caller, or another library for all threads,
// may have told it to flush denormals.
struct Environment {
  Environment() {
    std::fegetenv(&before);
    std::fesetenv(FE_DFL_ENV);
  }
  ~Environment() { std::fesetenv(&before); }
  std::fenv_t before;
};

// What the crew of one call shares; the last of it to go, which may be after the call, lets go of this.
struct Shift {
  std::atomic<int64_t> next{0}, bytes{0};
  std::atomic<bool> stop{false};
  std::mutex mutex;
  std::condition_variable done;
  std::exception_ptr error;
  int others = 0;
};

}  // namespace

void parallel(int64_t items, int threads, size_t scratch_bytes, const Tick& tick, const Work& work) {
  if (items <= 0) return;
  guard_against_cut_files();
  const auto shift = std::make_shared<Shift>();

  const auto guarding = [&](const auto& what) {
    try {
      what();
    } catch (...) {
      const std::lock_guard<std::mutex> lock(shift->mutex);
      if (!shift->error) shift->error = std::current_exception();
      shift->stop = true;
    }
  };
  const auto labour = [&](const auto& between) {
    guarding([&] {
      const Environment environment;
      const Block scratch(scratch_bytes);
      for (int64_t item; !shift->stop && (item = shift->next++) < items; between()) {
        shift->bytes += guarded_work(work, item, scratch.start);
      }
    });
  };
  auto told = std::chrono::steady_clock::now();
  const auto tell = [&] {
    if (!tick || std::chrono::steady_clock::now() < told + BREATH) return;
    tick(shift->bytes.exchange(0));
    told = std::chrono::steady_clock::now();
  };
  const auto leave = [shift] {
    const std::lock_guard<std::mutex> lock(shift->mutex);
    if (--shift->others == 0) shift->done.notify_all();
  };

  const auto job = std::make_shared<const Job>(Job{[&] { labour([] {}); }, leave});
  for (int64_t other = 1; other < std::min<int64_t>(threads, items); ++other) {
    {
      const std::lock_guard<std::mutex> lock(shift->mutex);
      ++shift->others;
    }
    if (hand_over(job)) continue;
    leave();  // the machine gives no more threads: those there are do the work
    break;
  }
  labour(tell);
  std::unique_lock<std::mutex> lock(shift->mutex);
  while (!shift->done.wait_for(lock, BREATH, [&] { return shift->others == 0; })) {
    lock.unlock();
    guarding(tell);
    lock.lock();
  }
  const std::exception_ptr error = std::exchange(shift->error, nullptr);
  lock.unlock();
  if (error) std::rethrow_exception(error);
  if (tick) tick(shift->bytes.exchange(0));
}

}  // namespace fastmerge
