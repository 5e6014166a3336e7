#include "hands.h"

#include <pthread.h>
#include <signal.h>

#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace fastmerge {
namespace {

struct Hand {
  std::mutex mutex;
  std::condition_variable wake;
  Job work, finished;
};

struct Waiting {
  std::mutex mutex;
  std::vector<Hand*> hands;
};

// Never destroyed: hands wait for as long as the process lives. A forked process has none of them, and begins anew.
Waiting* waiting = nullptr;

void begin_anew() {
  waiting = new Waiting;
}

void prepare() {
  static std::once_flag once;
  std::call_once(once, [] {
    begin_anew();
    pthread_atfork(nullptr, nullptr, begin_anew);
  });
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
  if (waiting->hands.size() >= std::thread::hardware_concurrency()) return false;
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
    Job work, finished;
    {
      std::unique_lock<std::mutex> lock(hand->mutex);
      hand->wake.wait(lock, [&] { return static_cast<bool>(hand->work); });
      std::swap(work, hand->work);
      std::swap(finished, hand->finished);
    }
    work();
    stays = wait_too(hand);
    finished();
  }
  delete hand;
}

}  // namespace

bool hand_over(Job work, Job finished) {
  prepare();
  Hand* hand = one_that_waits();
  const bool is_new = !hand;
  if (is_new) hand = new Hand;
  {
    const std::lock_guard<std::mutex> lock(hand->mutex);
    hand->work = std::move(work);
    hand->finished = std::move(finished);
  }
  hand->wake.notify_one();
  if (!is_new) return true;
  try {
    std::thread(serve, hand).detach();
    return true;
  } catch (const std::system_error&) {
    delete hand;
    return false;
  }
}

}  // namespace fastmerge
