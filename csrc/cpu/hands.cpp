#include "hands.h"

#include <pthread.h>
#include <signal.h>

#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace fastmerge {
namespace {

struct Hand {
  std::mutex mutex;
  std::condition_variable wake;
  std::shared_ptr<const Job> job;
};

struct Waiting {
  std::mutex mutex;
  std::vector<Hand*> hands;
};

// Never destroyed: hands wait for as long as the process lives. A forked process has none of them, and begins anew.
Waiting* waiting = nullptr;

void begin_anew() {
  waiting = new Waiting;
  waiting->hands.reserve(std::thread::hardware_concurrency());
}

void prepare() {
  [[maybe_unused]] static const bool once = [] {
    begin_anew();
    return pthread_atfork(nullptr, nullptr, begin_anew) == 0;
  }();
}

Hand* one_that_waits() {
  const std::lock_guard<std::mutex> lock(waiting->mutex);
  if (waiting->hands.empty()) return nullptr;
  Hand* hand = waiting->hands.back();
  waiting->hands.pop_back();
  return hand;
}

// False where so many wait as can run at once.
bool wait_too(Hand* hand) {
  const std::lock_guard<std::mutex> lock(waiting->mutex);
  if (waiting->hands.size() == waiting->hands.capacity()) return false;
  waiting->hands.push_back(hand);
  return true;
}

// Signals are for the threads of the program, but for those that a thread's own faults raise.
void leave_signals_to_others() {
  sigset_t signals;
  sigfillset(&signals);
  for (const int own : {SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGTRAP, SIGABRT}) sigdelset(&signals, own);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
}

void serve(Hand* hand) {
  leave_signals_to_others();
  for (bool stays = true; stays;) {
    std::shared_ptr<const Job> job;
    {
      std::unique_lock<std::mutex> lock(hand->mutex);
      hand->wake.wait(lock, [&] { return static_cast<bool>(hand->job); });
      std::swap(job, hand->job);
    }
    job->work();
    stays = wait_too(hand);
    job->finished();
  }
  delete hand;
}

}  // namespace

bool hand_over(std::shared_ptr<const Job> job) noexcept try {
  prepare();
  if (Hand* hand = one_that_waits()) {
    const std::lock_guard<std::mutex> lock(hand->mutex);
    hand->job = std::move(job);
    hand->wake.notify_one();
    return true;
  }
  auto hand = std::make_unique<Hand>();
  hand->job = std::move(job);
  std::thread(serve, hand.get()).detach();
  hand.release();  // it is its thread's own
  return true;
} catch (const std::exception&) {
  return false;
}

}  // namespace fastmerge
