/* A storage that goes away: calls on files below $FLAKY_DIR whose names hold $FLAKY_NAME fail with $FLAKY_ERRNO.
 * Every $FLAKY_EVERY-th call begins an outage of $FLAKY_SECONDS, the first of open, the next of read, then of stat. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { OPEN, READ, STAT, KINDS };

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

static int named(const char *path) {
  const char *folder = getenv("FLAKY_DIR"), *name = getenv("FLAKY_NAME");
  return folder && path && !strncmp(path, folder, strlen(folder)) && strstr(path, name ? name : ".jpg");
}

static int fails(int kind, const char *path) {
  static long calls;
  static double until;
  static int outages;
  const char *every = getenv("FLAKY_EVERY");
  if (!every || !named(path)) return 0;
  if (now() >= until && __sync_add_and_fetch(&calls, 1) % atol(every) == 0) {
    outages += 1;
    until = now() + atof(getenv("FLAKY_SECONDS"));
  }
  if (now() >= until || (outages - 1) % KINDS != kind) return 0;
  errno = atoi(getenv("FLAKY_ERRNO"));
  return 1;
}

static int fails_at(int kind, int file) {
  char link[64], path[4096];
  if (!getenv("FLAKY_EVERY")) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return fails(kind, path);
}

#define REAL(name, ...) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))(__VA_ARGS__)
#define MODE va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest)
#define OPENS(name) int name(const char *path, int flags, ...) { \
  MODE; return fails(OPEN, path) ? -1 : REAL(name, path, flags, mode); }
#define STATS(name, type) int name(const char *path, struct type *out) { \
  return fails(STAT, path) ? -1 : REAL(name, path, out); }
#define FSTATS(name, type) int name(int file, struct type *out) { \
  return fails_at(STAT, file) ? -1 : REAL(name, file, out); }

OPENS(open)
OPENS(open64)
STATS(stat, stat)
STATS(stat64, stat64)
STATS(lstat, stat)
STATS(lstat64, stat64)
FSTATS(fstat, stat)
FSTATS(fstat64, stat64)

ssize_t read(int file, void *out, size_t size) { return fails_at(READ, file) ? -1 : REAL(read, file, out, size); }
ssize_t pread(int file, void *out, size_t size, off_t at) {
  return fails_at(READ, file) ? -1 : REAL(pread, file, out, size, at);
}
ssize_t pread64(int file, void *out, size_t size, off64_t at) {
  return fails_at(READ, file) ? -1 : REAL(pread64, file, out, size, at);
}
