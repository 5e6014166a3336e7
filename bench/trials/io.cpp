// One way to read inputs and to write an output, timed once; run.py holds the ways against one another.
//
//     io FOLDER INPUTS MEGABYTES THREADS READ WRITE TILE_KB
//
// FOLDER has in0, in1, ... of MEGABYTES each; what is written is FOLDER/out, a new file. The rest mirrors a merge:
// tiles go to whichever thread is free, a batch of them ends with all threads done and its output on the way to the
// disk (Writer.written), the file is allocated first and synced last (Writer.commit). Between reading and writing is
// the loop of ../ceiling.cpp. Prints one line of JSON, or what the system refused, and exits with 3.
#include <fcntl.h>
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/syscall.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <memory>
#include <string>

#include "../ceiling.cpp"

namespace {

constexpr int64_t BATCH = 256 << 20;  // bytes of all inputs, as the engine has it
constexpr int64_t PAGE = 4096;        // what O_DIRECT wants places, sizes and addresses to be multiples of
constexpr int MOST = 8;               // inputs

[[noreturn]] void refuse(const char* what) {
  fprintf(stderr, "%s: %s\n", what, strerror(errno));
  exit(3);
}

template <class Result>
Result must(Result result, const char* what) {
  if (result < 0) refuse(what);
  return result;
}

// The two rings of io_uring, by its system calls alone: at most 16 requests under way, of one thread.
class Ring {
 public:
  Ring() {
    io_uring_params about = {};
    file_ = static_cast<int>(must(syscall(SYS_io_uring_setup, 16, &about), "io_uring_setup"));
    char* asked = map(about.sq_off.array + about.sq_entries * sizeof(unsigned), IORING_OFF_SQ_RING);
    char* done = map(about.cq_off.cqes + about.cq_entries * sizeof(io_uring_cqe), IORING_OFF_CQ_RING);
    entries_ = reinterpret_cast<io_uring_sqe*>(map(about.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES));
    order_ = reinterpret_cast<unsigned*>(asked + about.sq_off.array);
    asked_tail_ = reinterpret_cast<unsigned*>(asked + about.sq_off.tail);
    asked_mask_ = about.sq_entries - 1;
    done_head_ = reinterpret_cast<unsigned*>(done + about.cq_off.head);
    done_tail_ = reinterpret_cast<unsigned*>(done + about.cq_off.tail);
    done_mask_ = about.cq_entries - 1;
    results_ = reinterpret_cast<io_uring_cqe*>(done + about.cq_off.cqes);
  }

  // `left`, a count of requests, grows by one until this one is done.
  void ask(int operation, int file, char* bytes, int64_t length, int64_t at, int* left) {
    const unsigned tail = *asked_tail_, place = tail & asked_mask_;
    io_uring_sqe& entry = entries_[place];
    entry = {};
    entry.opcode = static_cast<uint8_t>(operation);
    entry.fd = file;
    entry.addr = reinterpret_cast<uint64_t>(bytes);
    entry.len = static_cast<unsigned>(length);
    entry.off = static_cast<uint64_t>(at);
    requests_[place] = {left, length};
    entry.user_data = place;
    order_[place] = place;
    __atomic_store_n(asked_tail_, tail + 1, __ATOMIC_RELEASE);
    ++*left;
    ++unsent_;
  }

  void send() {
    if (unsent_) must(syscall(SYS_io_uring_enter, file_, unsent_, 0, 0, nullptr, 0), "io_uring_enter");
    unsent_ = 0;
  }

  void wait(const int& left) {
    while (left) {
      if (*done_head_ == __atomic_load_n(done_tail_, __ATOMIC_ACQUIRE)) {
        must(syscall(SYS_io_uring_enter, file_, 0, 1, IORING_ENTER_GETEVENTS, nullptr, 0), "io_uring_enter");
        continue;
      }
      const io_uring_cqe& result = results_[*done_head_ & done_mask_];
      const Request& request = requests_[result.user_data];
      errno = result.res < 0 ? -result.res : EIO;
      if (result.res != request.length) refuse("a request to io_uring");
      --*request.left;
      __atomic_store_n(done_head_, *done_head_ + 1, __ATOMIC_RELEASE);
    }
  }

 private:
  struct Request {
    int* left;
    int64_t length;
  };

  char* map(size_t bytes, off_t which) {
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, file_, which);
    if (at == MAP_FAILED) refuse("mapping io_uring");
    return static_cast<char*>(at);
  }

  int file_;
  unsigned unsent_ = 0, asked_mask_, done_mask_;
  unsigned *order_, *asked_tail_, *done_head_, *done_tail_;
  io_uring_sqe* entries_;
  io_uring_cqe* results_;
  Request requests_[16];
};

struct Range {
  int64_t begin, end;
};

// The files, and how they are read and written.
struct Job {
  Job(const std::string& folder, int count, int64_t size, std::string how_to_read, std::string how_to_write)
      : inputs(count),
        bytes(size),
        read(std::move(how_to_read)),
        write(std::move(how_to_write)),
        out_path(folder + "/out") {
    for (int i = 0; i < inputs; ++i) {
      const std::string path = folder + "/in" + std::to_string(i);
      in[i] = must(open(path.c_str(), O_RDONLY | direct(read)), path.c_str());
      if (read == "mapped" || read == "populate" || read == "willneed" || read == "hugepage") {
        mapped[i] = map(PROT_READ, in[i]);
      }
      if (read == "hugepage") must(madvise(mapped[i], static_cast<size_t>(bytes), MADV_HUGEPAGE), "MADV_HUGEPAGE");
    }
    if (write == "none") return;
    out = must(open(out_path.c_str(), O_RDWR | O_CREAT | O_EXCL | direct(write), 0666), out_path.c_str());
    if ((errno = posix_fallocate(out, 0, bytes))) refuse("posix_fallocate");
    if (write == "mapped") mapped_out = map(PROT_READ | PROT_WRITE, out);
  }

  static int direct(const std::string& way) { return way.find("direct") == std::string::npos ? 0 : O_DIRECT; }
  bool ring_reads() const { return read.rfind("uring", 0) == 0; }
  bool ring_writes() const { return write.rfind("uring", 0) == 0; }

  char* map(int protection, int file) const {
    void* at = mmap(nullptr, static_cast<size_t>(bytes), protection, MAP_SHARED, file, 0);
    if (at == MAP_FAILED) refuse("mmap");
    return static_cast<char*>(at);
  }

  void unmap() const {
    for (char* each : mapped) munmap(each, each ? static_cast<size_t>(bytes) : 0);
    if (mapped_out) munmap(mapped_out, static_cast<size_t>(bytes));
  }

  int inputs;
  int64_t bytes;
  std::string read, write, out_path;
  int in[MOST], out = -1;
  char *mapped[MOST] = {}, *mapped_out = nullptr;
};

// A thread's buffers. With io_uring there are two sets of them: the next tile is read, and the last one written, while
// this one is combined.
class Worker {
 public:
  Worker(const Job& job, int64_t tile) : job_(job), slots_(job.ring_reads() || job.ring_writes() ? 2 : 1) {
    if (slots_.size() == 2) ring_ = std::make_unique<Ring>();
    for (Slot& slot : slots_) {
      slot.hot = static_cast<char*>(std::aligned_alloc(PAGE, static_cast<size_t>(tile)));
      for (int i = 0; i < job.inputs && !job.mapped[0]; ++i) {
        slot.from[i] = static_cast<char*>(std::aligned_alloc(PAGE, static_cast<size_t>(tile)));
      }
    }
    if (job.write == "sendfile") own_out_ = must(open(job.out_path.c_str(), O_WRONLY), "out");
  }

  template <class Next>
  void work(const Next& next) {
    size_t turn = 0;
    Range now = next();
    ask(slots_[turn], now);
    while (now.begin < now.end) {
      Slot& slot = slots_[turn];
      turn = (turn + 1) % slots_.size();
      const Range then = next();
      ask(slots_[turn], then);
      if (!pass_through(now)) {
        take(slot, now);
        if (ring_) ring_->wait(slot.writing);
        put(slot, now);
      }
      now = then;
    }
    for (Slot& slot : slots_) {
      if (ring_) ring_->wait(slot.writing);
    }
  }

 private:
  struct Slot {
    char* from[MOST] = {};  // where the tile's bytes lie
    char* hot = nullptr;
    int reading = 0, writing = 0;
  };

  void ask(Slot& slot, const Range& range) {
    for (int i = 0; i < job_.inputs && range.begin < range.end; ++i) {
      const int64_t length = range.end - range.begin;
      if (job_.read == "willneed") must(madvise(job_.mapped[i] + range.begin, length, MADV_WILLNEED), "MADV_WILLNEED");
      if (job_.ring_reads()) {
        ring_->ask(IORING_OP_READ, job_.in[i], slot.from[i], length, range.begin, &slot.reading);
      }
    }
    if (ring_) ring_->send();
  }

  void take(Slot& slot, const Range& range) {
    const int64_t length = range.end - range.begin;
    for (int i = 0; i < job_.inputs; ++i) {
      if (job_.mapped[i]) slot.from[i] = job_.mapped[i] + range.begin;
      if (job_.read == "populate") must(madvise(slot.from[i], length, MADV_POPULATE_READ), "MADV_POPULATE_READ");
      if (job_.read.rfind("pread", 0) == 0) {
        errno = EIO;
        if (pread(job_.in[i], slot.from[i], length, range.begin) != length) refuse("pread");
      }
    }
    if (job_.ring_reads()) ring_->wait(slot.reading);
  }

  void put(Slot& slot, const Range& range) {
    const int64_t length = range.end - range.begin;
    if (job_.write == "none") return sweep<NONE>(slot.from, job_.inputs, nullptr, 0, length);
    const bool straight = job_.write == "straight";
    char* to = job_.mapped_out ? job_.mapped_out + range.begin : straight ? slot.from[0] : slot.hot;
    if (!straight) sweep<PLAIN>(slot.from, job_.inputs, to, 0, length);
    if (job_.mapped_out) return;
    if (job_.ring_writes()) {
      ring_->ask(IORING_OP_WRITE, job_.out, to, length, range.begin, &slot.writing);
      return ring_->send();
    }
    errno = EIO;
    if (pwrite(job_.out, to, length, range.begin) != length) refuse("pwrite");
    if (job_.write == "pwrite-begin") {
      must(sync_file_range(job_.out, range.begin, length, SYNC_FILE_RANGE_WRITE), "sync_file_range");
    }
  }

  // Whether the system moves the bytes without showing them to us.
  bool pass_through(const Range& range) {
    const bool copies = job_.write == "copy_file_range";
    if (!copies && job_.write != "sendfile") return false;
    off_t from = range.begin, to = range.begin;
    if (!copies) must(lseek(own_out_, to, SEEK_SET), "lseek");
    while (from < range.end) {
      const size_t rest = static_cast<size_t>(range.end - from);
      const ssize_t moved = copies ? copy_file_range(job_.in[0], &from, job_.out, &to, rest, 0)
                                   : sendfile(own_out_, job_.in[0], &from, rest);
      if (moved <= 0) refuse(job_.write.c_str());
    }
    return true;
  }

  const Job& job_;
  std::vector<Slot> slots_;
  std::unique_ptr<Ring> ring_;
  int own_out_ = -1;
};

void merge(const Job& job, int threads, int64_t tile) {
  std::vector<Worker> workers;
  for (int i = 0; i < threads; ++i) workers.emplace_back(job, tile);
  const int64_t step = BATCH / job.inputs;
  for (int64_t batch = 0; batch < job.bytes; batch += step) {
    const int64_t end = std::min(batch + step, job.bytes);
    std::atomic<int64_t> at{batch};
    const auto next = [&] {
      const int64_t begin = std::min(at.fetch_add(tile), end);
      return Range{begin, std::min(begin + tile, end)};
    };
    std::vector<std::thread> crew;
    for (Worker& worker : workers) crew.emplace_back([&] { worker.work(next); });
    for (std::thread& each : crew) each.join();
    const bool early = job.out >= 0 && job.write != "pwrite-begin" && job.write != "pwrite-late";
    if (early) posix_fadvise(job.out, batch, end - batch, POSIX_FADV_DONTNEED);
  }
}

// The share of the inputs that is in the page cache.
double cached(const std::string& folder, int inputs, int64_t bytes) {
  std::vector<unsigned char> pages(static_cast<size_t>(bytes / PAGE));
  int64_t there = 0;
  const Job job(folder, inputs, bytes, "mapped", "none");
  for (int i = 0; i < inputs; ++i) {
    must(mincore(job.mapped[i], static_cast<size_t>(bytes), pages.data()), "mincore");
    for (const unsigned char page : pages) there += page & 1;
  }
  job.unmap();
  return static_cast<double>(there) / static_cast<double>(pages.size() * static_cast<size_t>(inputs));
}

double seconds(const timeval& time) {
  return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
}

}  // namespace

int main(int count, char** words) {
  if (count != 8) return fprintf(stderr, "usage: io FOLDER INPUTS MEGABYTES THREADS READ WRITE TILE_KB\n"), 2;
  const int inputs = atoi(words[2]);
  const int64_t bytes = atoll(words[3]) << 20;
  const double warm = cached(words[1], inputs, bytes);

  rusage before, after;
  getrusage(RUSAGE_SELF, &before);
  const auto start = std::chrono::steady_clock::now();
  const auto since = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  const Job job(words[1], inputs, bytes, words[5], words[6]);
  merge(job, atoi(words[4]), atoll(words[7]) << 10);
  job.unmap();
  const double written = since();
  if (job.out >= 0) must(fsync(job.out), "fsync");
  const double synced = since();
  getrusage(RUSAGE_SELF, &after);

  printf("{\"cached\": %.4f, \"written\": %.6f, \"synced\": %.6f, \"user\": %.6f, \"system\": %.6f, ", warm, written,
         synced, seconds(after.ru_utime) - seconds(before.ru_utime),
         seconds(after.ru_stime) - seconds(before.ru_stime));
  printf("\"minor\": %ld, \"major\": %ld, \"seen\": %lu}\n", after.ru_minflt - before.ru_minflt,
         after.ru_majflt - before.ru_majflt, seen.load());
}
