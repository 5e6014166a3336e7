// The ops of csrc/cpu in a process of their own, for tests/driven.py: requests come on standard input, answers go to
// standard output, both as arrays with their size in bytes before them.
#include <fcntl.h>
#include <sanitizer/asan_interface.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <system_error>
#include <vector>

#include "../csrc/cpu/ops.h"

#ifdef FASTMERGE_ONLY  // the one instruction set that is linked, instead of dispatch.cpp
namespace fastmerge {
extern const Kernels FASTMERGE_ONLY;
const Kernels* const KERNELS[] = {&FASTMERGE_ONLY};
const int KERNELS_COUNT = 1;
const char* why_not(const Kernels&) {
  return nullptr;
}
}  // namespace fastmerge
#endif

using namespace fastmerge;

namespace {

// What an op meets: inputs that are cut, a tick that throws, files on a full disk.
enum Fault : int64_t { NONE = 0, CUT = 1, STOP = 2, FULL = 3 };

struct Stopped {};

// --- arrays ---

using Bytes = std::vector<char>;
using Answer = std::vector<Bytes>;

void take(void* to, size_t bytes) {
  if (bytes && fread(to, 1, bytes, stdin) != bytes) exit(0);  // nobody asks any more
}

template <class T>
std::vector<T> received() {
  int64_t bytes;
  take(&bytes, sizeof bytes);
  std::vector<T> values(static_cast<size_t>(bytes) / sizeof(T));
  take(values.data(), static_cast<size_t>(bytes));
  return values;
}

template <class T>
Bytes bytes_of(const std::vector<T>& values) {
  const char* start = reinterpret_cast<const char*>(values.data());
  return {start, start + values.size() * sizeof(T)};
}

void send(const Bytes& array) {
  const auto bytes = static_cast<int64_t>(array.size());
  fwrite(&bytes, sizeof bytes, 1, stdout);
  if (bytes) fwrite(array.data(), 1, array.size(), stdout);
}

void require(bool sound, const char* what) {
  if (sound) return;
  perror(what);
  abort();
}

// --- memory and files ---

// So many bytes between guards, as misaligned as they are at an address of the other side.
class Memory {
 public:
  Memory(uint64_t address, int64_t bytes)
      : whole_(static_cast<size_t>(bytes + 3 * LINE_BYTES), GUARD), start_(whole_.data() + LINE_BYTES) {
    start_ += (address - reinterpret_cast<uint64_t>(start_)) % LINE_BYTES;
    end_ = start_ + bytes;
    ASAN_POISON_MEMORY_REGION(whole_.data(), static_cast<size_t>(start_ - whole_.data()));
    ASAN_POISON_MEMORY_REGION(end_, static_cast<size_t>(whole_.data() + whole_.size() - end_));
  }
  ~Memory() { ASAN_UNPOISON_MEMORY_REGION(whole_.data(), whole_.size()); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  char* start() const { return start_; }
  Bytes checked() const {
    ASAN_UNPOISON_MEMORY_REGION(whole_.data(), whole_.size());
    const auto is_guard = [](char byte) { return byte == GUARD; };
    const char *first = whole_.data(), *last = first + whole_.size();
    require(std::all_of(first, static_cast<const char*>(start_), is_guard) &&
                std::all_of(static_cast<const char*>(end_), last, is_guard),
            "written outside of the output");
    return {start_, end_};
  }

 private:
  static constexpr char GUARD = '\xa5';
  static constexpr int64_t LINE_BYTES = 64;
  Bytes whole_;
  char *start_, *end_;
};

int unnamed_file(int64_t bytes) {
  const int file = memfd_create("driver", MFD_CLOEXEC);
  require(file >= 0 && ftruncate(file, bytes) == 0, "no unnamed file");
  return file;
}

// A mapped file, whose second half can be cut off.
class Mapped {
 public:
  Mapped(uint64_t address, int64_t bytes)
      : bytes_(bytes), size_(static_cast<size_t>(bytes + 2 * PAGE)), file_(unnamed_file(bytes + 2 * PAGE)) {
    void* at = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_SHARED, file_, 0);
    require(at != MAP_FAILED, "no mapping");
    whole_ = static_cast<char*>(at);
    start_ = whole_ + address % PAGE;
  }
  ~Mapped() {
    munmap(whole_, size_);
    close(file_);
  }
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;

  char* start() const { return start_; }
  void cut() const { require(ftruncate(file_, bytes_ / 2 / PAGE * PAGE) == 0, "not cut"); }

 private:
  static constexpr int64_t PAGE = 4096;
  int64_t bytes_;
  size_t size_;
  int file_;
  char *whole_, *start_;
};

// An input as the other side sends it: in memory, or mapped from a file that is cut before it is read.
class Input {
 public:
  Input(uint64_t address, int64_t bytes, Fault fault) {
    if (fault == CUT) {
      mapped_ = std::make_unique<Mapped>(address, bytes);
    } else {
      memory_ = std::make_unique<Memory>(address, bytes);
    }
    take(start(), static_cast<size_t>(bytes));
    if (mapped_) mapped_->cut();
  }
  char* start() const { return mapped_ ? mapped_->start() : memory_->start(); }

 private:
  std::unique_ptr<Memory> memory_;
  std::unique_ptr<Mapped> mapped_;
};

// What a target of the other side becomes here: memory, or a place in a file.
class Written {
 public:
  Written(Target& target, int64_t bytes, Fault fault) : bytes_(bytes), offset_(target.offset) {
    if (target.file < 0) {
      memory_ = std::make_unique<Memory>(static_cast<uint64_t>(offset_), bytes);
      target.offset = reinterpret_cast<int64_t>(memory_->start());
    } else {
      target.file = file_ = fault == FULL ? open("/dev/full", O_RDWR | O_CLOEXEC) : unnamed_file(0);
    }
  }
  ~Written() {
    if (file_ >= 0) close(file_);
  }
  Written(const Written&) = delete;
  Written& operator=(const Written&) = delete;

  Bytes checked() const {
    if (memory_) return memory_->checked();
    struct stat status;
    Bytes before(static_cast<size_t>(offset_)), here(static_cast<size_t>(bytes_));
    require(fstat(file_, &status) == 0 && status.st_size <= offset_ + bytes_, "written past the output");
    require(pread(file_, before.data(), before.size(), 0) >= 0, "not read back");
    require(std::count(before.begin(), before.end(), 0) == offset_, "written before the output");
    require(pread(file_, here.data(), here.size(), offset_) >= 0, "not read back");
    return here;
  }

 private:
  int64_t bytes_, offset_;
  std::unique_ptr<Memory> memory_;
  int file_ = -1;
};

// --- what every op but `lowrank` is given ---

struct Request {
  std::vector<Row> rows = received<Row>();
  std::vector<View> views = received<View>();
  std::vector<Sweep> sweeps = received<Sweep>();
  std::vector<Part> parts = received<Part>();
  std::vector<Target> targets = received<Target>();
  std::vector<int64_t> ranks = received<int64_t>();
  std::vector<std::unique_ptr<Input>> inputs;
  std::vector<std::unique_ptr<Written>> outputs;
  std::vector<Tensor> tensors;

  explicit Request(Fault fault) {
    View* view = views.data();
    Target* target = targets.data();
    for (const Row& row : rows) {
      tensors.push_back({view, row.elements, row.models, row.inputs, row.begin});
      for (int32_t i = 0; i < row.inputs; ++i, ++view) {
        inputs.push_back(std::make_unique<Input>(view->address, row.elements * size_of(dtype_of(*view)), fault));
        view->address = reinterpret_cast<uint64_t>(inputs.back()->start());
      }
      for (int32_t i = 0; target != targets.data() + targets.size() && i < row.settings; ++i, ++target) {
        const int64_t bytes = row.elements * size_of(static_cast<DType>(target->dtype));
        outputs.push_back(std::make_unique<Written>(*target, bytes, fault));
      }
    }
  }

  size_t parts_of(size_t t) const {
    return static_cast<size_t>(rows[t].settings) * static_cast<size_t>(rows[t].models);
  }
};

// Something to hash by: it reads every byte.
Hash128 sum_of(const void* bytes, size_t count) {
  const char* from = static_cast<const char*>(bytes);
  return {static_cast<uint64_t>(std::count(from, from + count, 0)), count};
}

Crew hashing(Crew crew, const Request& request) {
  const bool files = std::all_of(request.targets.begin(), request.targets.end(), [](auto& to) { return to.file >= 0; });
  crew.hash = files ? sum_of : nullptr;
  return crew;
}

struct Merges {
  explicit Merges(const Request& request)
      : nonfinite(request.views.size()), first(request.views.size(), -1), overflow(request.targets.size()) {
    size_t view = 0, setting = 0, part = 0;
    hashes.reserve(request.targets.size());
    for (size_t t = 0; t < request.rows.size(); ++t) {
      const Row& row = request.rows[t];
      for (size_t k = setting; k < setting + static_cast<size_t>(row.settings); ++k) {
        hashes.emplace_back(row.elements * size_of(static_cast<DType>(request.targets[k].dtype)));
      }
      all.push_back({request.tensors[t], row.settings, request.sweeps.data() + setting, request.parts.data() + part,
                     request.targets.data() + setting, nonfinite.data() + view, first.data() + view,
                     overflow.data() + setting, hashes.data() + setting});
      view += static_cast<size_t>(row.inputs);
      setting += static_cast<size_t>(row.settings);
      part += request.parts_of(t);
    }
  }
  Answer answer(const Request& request) const {
    for (const PieceHashes& each : hashes) {
      char whole[PieceHashes::SIZE];
      each.whole(sum_of, whole);
    }
    Answer found = {bytes_of(nonfinite), bytes_of(first), bytes_of(overflow)};
    for (const auto& output : request.outputs) found.push_back(output->checked());
    return found;
  }

  std::vector<Merge> all;
  std::vector<PieceHashes> hashes;
  std::vector<int64_t> nonfinite, first, overflow;
};

void add(Answer& answer, const std::vector<Cut>& cuts) {
  std::vector<float> magnitudes;
  std::vector<int64_t> ends;
  for (const Cut& cut : cuts) {
    magnitudes.push_back(cut.magnitude);
    ends.push_back(cut.ties_end);
  }
  answer.push_back(bytes_of(magnitudes));
  answer.push_back(bytes_of(ends));
}

// --- the ops ---

Answer merge(const Crew& crew, Fault fault) {
  const Request request(fault);
  Merges merges(request);
  fastmerge::merge(merges.all, hashing(crew, request));
  return merges.answer(request);
}

Answer merge_ranked(const Crew& crew, Fault fault) {
  const Request request(fault);
  Merges merges(request);
  std::vector<Cut> cuts(request.ranks.size());
  std::vector<const int64_t*> ranks;
  std::vector<Cut*> starts;
  size_t model = 0;
  for (const Row& row : request.rows) {
    ranks.push_back(request.ranks.data() + model);
    starts.push_back(cuts.data() + model);
    model += static_cast<size_t>(row.models);
  }
  fastmerge::merge_ranked(merges.all, ranks, starts, hashing(crew, request));
  Answer answer = merges.answer(request);
  add(answer, cuts);
  return answer;
}

Answer gram(const Crew& crew, Fault fault) {
  const Request request(fault);
  size_t total = 0;
  for (const Row& row : request.rows) total += static_cast<size_t>(row.models * row.models);
  std::vector<double> products(total);
  std::vector<double*> starts;
  size_t start = 0;
  for (const Row& row : request.rows) {
    starts.push_back(products.data() + start);
    start += static_cast<size_t>(row.models * row.models);
  }
  fastmerge::gram(request.tensors, starts, crew);
  return {bytes_of(products)};
}

Answer norms(const Crew& crew, Fault fault) {
  const Request request(fault);
  std::vector<double> sums(request.parts.size() * 6);
  std::vector<const Sweep*> sweeps;
  std::vector<const Part*> parts;
  std::vector<double*> starts;
  size_t part = 0;
  for (size_t t = 0; t < request.rows.size(); part += request.parts_of(t), ++t) {
    sweeps.push_back(request.sweeps.data() + t);
    parts.push_back(request.parts.data() + part);
    starts.push_back(sums.data() + part * 6);
  }
  fastmerge::norms(request.tensors, sweeps, parts, starts, crew);
  return {bytes_of(sums)};
}

Answer threshold(const Crew& crew, Fault fault) {
  const Request request(fault);
  std::vector<Group> groups;
  std::vector<Cut> cuts(request.ranks.size());
  std::vector<const int64_t*> ranks;
  std::vector<Cut*> starts;
  size_t model = 0;
  for (size_t t = 0; t < request.rows.size(); ++t) {
    if (t == 0 || request.rows[t].group != request.rows[t - 1].group) {
      groups.emplace_back();
      ranks.push_back(request.ranks.data() + model);
      starts.push_back(cuts.data() + model);
      model += static_cast<size_t>(request.rows[t].models);
    }
    groups.back().push_back(request.tensors[t]);
  }
  fastmerge::threshold(groups, ranks, starts, crew);
  Answer answer;
  add(answer, cuts);
  return answer;
}

Answer lowrank(const Crew& crew, Fault fault) {
  const auto sizes = received<int64_t>();  // dtype, rank, rows, width, the address of the weights
  const auto left = received<float>(), right = received<float>(), scaling = received<float>();
  const auto dtype = static_cast<DType>(sizes[0]);
  const Input weights(static_cast<uint64_t>(sizes[4]), sizes[2] * sizes[3] * size_of(dtype), fault);
  const Memory out(0, sizes[2] * sizes[3] * 4);
  Crew own = crew;
  if (fault != STOP) own.tick = nullptr;  // as fastmerge.native calls it
  fastmerge::lowrank({weights.start(), dtype, static_cast<int>(sizes[1]), sizes[3], left.data(), right.data(),
                      scaling[0], reinterpret_cast<float*>(out.start())},
                     sizes[2], own);
  return {out.checked()};
}

// --- requests ---

constexpr int64_t DONE = 0, WAS_CUT = -1, WAS_STOPPED = -2;  // or the number of an error of the system

std::vector<const Kernels*> kernels_here() {
  std::vector<const Kernels*> here;
  std::copy_if(KERNELS, KERNELS + KERNELS_COUNT, std::back_inserter(here), [](auto* each) { return !why_not(*each); });
  return here;
}

void answer(const std::vector<int64_t>& asked, const Kernels* kernels) {
  Answer (*const ops[])(const Crew&, Fault) = {merge, merge_ranked, gram, norms, threshold, lowrank};
  const auto fault = static_cast<Fault>(asked[4]);
  int64_t outcome = DONE, read = 0;
  Answer answer;
  try {
    const auto tick = [&](int64_t bytes) {
      if (fault == STOP) throw Stopped();
      read += bytes;
    };
    answer = ops[asked[0]]({kernels, static_cast<int>(asked[2]), asked[3], tick}, fault);
  } catch (const InputCut&) {
    outcome = WAS_CUT;
    sigset_t bus;  // the thread sanitizer blocks all signals while a handler runs, and the jump out of it left it so
    sigemptyset(&bus);
    sigaddset(&bus, SIGBUS);
    pthread_sigmask(SIG_UNBLOCK, &bus, nullptr);
  } catch (const Stopped&) {
    outcome = WAS_STOPPED;
  } catch (const std::system_error& error) {
    outcome = error.code().value();
  }
  send(bytes_of(std::vector<int64_t>{outcome, read}));
  for (const Bytes& array : answer) send(array);
}

}  // namespace

int main() {
  const auto here = kernels_here();
  std::string names;
  for (const Kernels* each : here) names += std::string(names.empty() ? "" : " ") + each->name;
  send({names.begin(), names.end()});
  for (;;) {
    fflush(stdout);
    const auto asked = received<int64_t>();  // op, kernels, threads, tile, fault
    answer(asked, here[static_cast<size_t>(asked[1])]);
  }
}
