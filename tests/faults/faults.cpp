// A layer between a process and the system, by LD_PRELOAD: the n-th call on a file below a folder fails as it is told.
//
//   FAULT="pwrite 7 ENOSPC"  FAULT_BELOW=/folder   errors: ENOSPC EIO EDQUOT; EINTR and SHORT (half the bytes) once
//   every n calls; KILL raises SIGKILL before the call, TERM and INT send that signal and go on.
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>

namespace {

struct Fault {
  char call[32] = "", what[32] = "";
  long nth = 0;
  const char* below = getenv("FAULT_BELOW");
  Fault() {
    const char* told = getenv("FAULT");
    if (told && sscanf(told, "%31s %ld %31s", call, &nth, what) != 3) abort();
  }
};

const Fault& fault() {
  static const Fault fault;
  return fault;
}

bool below(const char* path) {
  char whole[8192] = "";
  if (path[0] != '/' && !getcwd(whole, 4096)) return false;
  strcat(strcat(whole, "/"), path);
  const char* at = path[0] == '/' ? path : whole;
  return fault().below && strncmp(at, fault().below, strlen(fault().below)) == 0;
}

bool below(int file) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return false;
  path[length] = 0;
  return below(path);
}

int number_of(const char* error) {
  return !strcmp(error, "ENOSPC") ? ENOSPC : !strcmp(error, "EDQUOT") ? EDQUOT : EIO;
}

enum class Now { Go, Fail, Short };

// What becomes of this call.
template <typename File>
Now meets(const char* call, File file) {
  static std::atomic<long> count{0};
  const Fault& told = fault();
  if (strcmp(told.call, call) && strcmp(told.call, "any")) return Now::Go;
  if (!below(file)) return Now::Go;
  const long now = ++count;
  if (!strcmp(told.what, "EINTR") || !strcmp(told.what, "SHORT")) {
    if (now % told.nth) return Now::Go;
    errno = EINTR;
    return told.what[0] == 'E' ? Now::Fail : Now::Short;
  }
  if (!strcmp(told.what, "KILL") || !strcmp(told.what, "TERM") || !strcmp(told.what, "INT")) {
    if (now == told.nth) kill(getpid(), told.what[0] == 'K' ? SIGKILL : told.what[0] == 'T' ? SIGTERM : SIGINT);
    return Now::Go;
  }
  if (now < told.nth) return Now::Go;  // a disk that is full stays full
  errno = number_of(told.what);
  return Now::Fail;
}

template <typename Function>
Function real(const char* name, Function) {
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

size_t part(Now now, size_t bytes) {
  return now == Now::Short && bytes > 1 ? bytes / 2 : bytes;
}

}  // namespace

extern "C" {

#define WRITES(name, offset)                                               \
  ssize_t name(int file, const void* from, size_t bytes, offset at) {      \
    static const auto next = real(#name, name);                            \
    const Now now = meets("pwrite", file);                                 \
    return now == Now::Fail ? -1 : next(file, from, part(now, bytes), at); \
  }
WRITES(pwrite, off_t)
WRITES(pwrite64, off64_t)

ssize_t write(int file, const void* from, size_t bytes) {
  static const auto next = real("write", write);
  const Now now = meets("write", file);
  return now == Now::Fail ? -1 : next(file, from, part(now, bytes));
}

ssize_t read(int file, void* to, size_t bytes) {
  static const auto next = real("read", read);
  const Now now = meets("read", file);
  return now == Now::Fail ? -1 : next(file, to, part(now, bytes));
}

#define READS(name, offset)                                              \
  ssize_t name(int file, void* to, size_t bytes, offset at) {            \
    static const auto next = real(#name, name);                          \
    const Now now = meets("pread", file);                                \
    return now == Now::Fail ? -1 : next(file, to, part(now, bytes), at); \
  }
READS(pread, off_t)
READS(pread64, off64_t)

// A short one fills half of the first part.
#define READS_PARTS(name, offset, ...)                                                          \
  ssize_t name(int file, const iovec* to, int parts, offset at __VA_OPT__(, int) __VA_ARGS__) { \
    static const auto next = real(#name, name);                                                 \
    const Now now = meets("pread", file);                                                       \
    if (now == Now::Fail) return -1;                                                            \
    iovec first = parts ? *to : iovec{};                                                        \
    first.iov_len = part(now, first.iov_len);                                                   \
    return now == Now::Short && parts ? next(file, &first, 1, at __VA_OPT__(, ) __VA_ARGS__)    \
                                      : next(file, to, parts, at __VA_OPT__(, ) __VA_ARGS__);   \
  }
READS_PARTS(preadv, off_t)
READS_PARTS(preadv64, off64_t)
READS_PARTS(preadv2, off_t, flags)
READS_PARTS(preadv64v2, off64_t, flags)

int fsync(int file) {
  static const auto next = real("fsync", fsync);
  return meets("fsync", file) == Now::Fail ? -1 : next(file);
}

#define RESERVES(name, offset)                                                       \
  int name(int file, offset from, offset length) {                                   \
    static const auto next = real(#name, name);                                      \
    return meets("fallocate", file) == Now::Fail ? errno : next(file, from, length); \
  }
RESERVES(posix_fallocate, off_t)
RESERVES(posix_fallocate64, off64_t)

int rename(const char* from, const char* to) {
  static const auto next = real("rename", rename);
  return meets("rename", to) == Now::Fail ? -1 : next(from, to);
}

int unlink(const char* path) {
  static const auto next = real("unlink", unlink);
  return meets("unlink", path) == Now::Fail ? -1 : next(path);
}
}
