/* Stands between a process and the C library: records every call that changes files below a folder, or makes one fail.

   Loaded with LD_PRELOAD, so that it sees C++ as well as Python. It does nothing until `file_calls_watch`. What the C
   library calls within itself, as fwrite does, passes by: a test compares what the records say with what is on disk. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum operation { CREATE, WRITE, TRUNCATE, RENAME, LINK, UNLINK, MKDIR, RMDIR, FSYNC, OPEN, READ };
static const char *NAMES[] = {"create", "write", "truncate", "rename", "link", "unlink",
                              "mkdir",  "rmdir", "fsync",    "open",   "read"};

/* Before a record's two paths and its bytes. */
struct record {
  uint32_t operation, num_first, num_second, num_bytes;
  uint64_t inode, offset;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static char folder[PATH_MAX];     /* what is watched; empty: nothing is */
static int records = -1;          /* where records are written; -1: nowhere */
static int error_number;          /* of the call that fails; 0: half of the bytes are written */
static int goes_on;               /* all calls after it fail, too */
static int counts_reads;          /* opening and reading count, too */
static long calls, fails_at = -1; /* from 1 */
static char failed[2 * PATH_MAX]; /* the calls that failed, as "write PATH" */

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

void file_calls_watch(const char *path, int descriptor) {
  pthread_mutex_lock(&mutex);
  snprintf(folder, sizeof folder, "%s", path);
  records = descriptor;
  pthread_mutex_unlock(&mutex);
}

void file_calls_fail(long number, int error, int all_later, int reads) {
  pthread_mutex_lock(&mutex);
  calls = 0, fails_at = number, error_number = error, goes_on = all_later, counts_reads = reads;
  failed[0] = 0;
  pthread_mutex_unlock(&mutex);
}

long file_calls_count(void) { return calls; }

const char *file_calls_failed(void) { return failed; }

static void path_of_descriptor(int descriptor, char *path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, PATH_MAX - 1);
  path[length > 0 ? length : 0] = 0;
}

/* The absolute path of a name in the folder with a descriptor. */
static void path_of(int in, const char *name, char *path) {
  char start[PATH_MAX] = "";
  if (name[0] != '/' && in == AT_FDCWD && getcwd(start, sizeof start) == NULL) start[0] = 0;
  if (name[0] != '/' && in != AT_FDCWD) path_of_descriptor(in, start);
  snprintf(path, PATH_MAX, name[0] == '/' ? "%s%s" : "%s/%s", start, name);
}

static int is_watched(const char *path) {
  size_t length = strlen(folder);
  return length > 0 && strncmp(path, folder, length) == 0 && (path[length] == '/' || path[length] == 0);
}

/* Whether this call is the one that fails; the mutex is held. */
static int is_to_fail(enum operation operation, const char *path) {
  if (fails_at < 0 || (operation >= OPEN && !counts_reads)) return 0;
  calls++;
  if (calls != fails_at && !(goes_on && calls > fails_at)) return 0;
  if (!failed[0]) snprintf(failed, sizeof failed, "%s %s", NAMES[operation], path);
  return 1;
}

static void write_all(const void *bytes, size_t count) {
  for (ssize_t done; count > 0; bytes = (const char *)bytes + done, count -= done)
    if ((done = REAL(write)(records, bytes, count)) <= 0) return;
}

/* The mutex is held. */
static void record(enum operation operation, const char *first, const char *second, uint64_t inode, uint64_t offset,
                   const void *bytes, size_t count) {
  if (records < 0) return;
  struct record head = {operation, strlen(first), strlen(second), count, inode, offset};
  write_all(&head, sizeof head);
  write_all(first, head.num_first);
  write_all(second, head.num_second);
  write_all(bytes, count);
}

static uint64_t inode_of(const char *path) {
  struct stat status;
  return lstat(path, &status) == 0 ? status.st_ino : 0;
}

static uint64_t inode_of_descriptor(int descriptor) {
  struct stat status;
  return fstat(descriptor, &status) == 0 ? status.st_ino : 0;
}

/* A call about the name `path`, if it is watched: made to fail, or recorded with the inode that `inode` evaluates to. */
#define ABOUT_NAMES(operation, path, second, inode, call)   \
  do {                                                      \
    if (!is_watched(path)) return call;                     \
    pthread_mutex_lock(&mutex);                             \
    int result = -1, error = error_number ? error_number : EIO; \
    if (!is_to_fail(operation, path)) {                     \
      result = call;                                        \
      error = errno;                                        \
      if (result == 0) record(operation, path, second, inode, 0, "", 0); \
    }                                                       \
    pthread_mutex_unlock(&mutex);                           \
    errno = error;                                          \
    return result;                                          \
  } while (0)

int renameat(int from_in, const char *from, int to_in, const char *to) {
  char first[PATH_MAX], second[PATH_MAX];
  path_of(from_in, from, first), path_of(to_in, to, second);
  ABOUT_NAMES(RENAME, first, second, inode_of(second), REAL(renameat)(from_in, from, to_in, to));
}

int rename(const char *from, const char *to) { return renameat(AT_FDCWD, from, AT_FDCWD, to); }

int linkat(int from_in, const char *from, int to_in, const char *to, int flags) {
  char first[PATH_MAX], second[PATH_MAX];
  path_of(from_in, from, first), path_of(to_in, to, second);
  ABOUT_NAMES(LINK, first, second, inode_of(second), REAL(linkat)(from_in, from, to_in, to, flags));
}

int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }

int unlinkat(int in, const char *name, int flags) {
  char path[PATH_MAX];
  path_of(in, name, path);
  ABOUT_NAMES(flags & AT_REMOVEDIR ? RMDIR : UNLINK, path, "", 0, REAL(unlinkat)(in, name, flags));
}

int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }

int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }

int remove(const char *name) {
  struct stat status;
  return unlinkat(AT_FDCWD, name, lstat(name, &status) == 0 && S_ISDIR(status.st_mode) ? AT_REMOVEDIR : 0);
}

int mkdirat(int in, const char *name, mode_t mode) {
  char path[PATH_MAX];
  path_of(in, name, path);
  ABOUT_NAMES(MKDIR, path, "", inode_of(path), REAL(mkdirat)(in, name, mode));
}

int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

static int flushed(int descriptor, int (*call)(int)) {
  char path[PATH_MAX];
  path_of_descriptor(descriptor, path);
  ABOUT_NAMES(FSYNC, path, "", inode_of_descriptor(descriptor), call(descriptor));
}

int fsync(int descriptor) { return flushed(descriptor, REAL(fsync)); }

int fdatasync(int descriptor) { return flushed(descriptor, REAL(fdatasync)); }

int ftruncate(int descriptor, off_t length) {
  char path[PATH_MAX];
  path_of_descriptor(descriptor, path);
  if (!is_watched(path)) return REAL(ftruncate)(descriptor, length);
  pthread_mutex_lock(&mutex);
  int result = -1, error = error_number ? error_number : EIO;
  if (!is_to_fail(TRUNCATE, path)) {
    result = REAL(ftruncate)(descriptor, length);
    error = errno;
    if (result == 0) record(TRUNCATE, path, "", inode_of_descriptor(descriptor), length, "", 0);
  }
  pthread_mutex_unlock(&mutex);
  errno = error;
  return result;
}

int ftruncate64(int descriptor, off_t length) { return ftruncate(descriptor, length); }

// The mode is given only where a file may be made.
#define TAKE_MODE(flags)                 \
  mode_t mode = 0;                       \
  if (flags & (O_CREAT | O_TMPFILE)) {   \
    va_list rest;                        \
    va_start(rest, flags);               \
    mode = va_arg(rest, mode_t);         \
    va_end(rest);                        \
  }

int openat(int in, const char *name, int flags, ...) {
  TAKE_MODE(flags)
  char path[PATH_MAX];
  path_of(in, name, path);
  if (!is_watched(path)) return REAL(openat)(in, name, flags, mode);
  pthread_mutex_lock(&mutex);
  int descriptor = -1, error = error_number ? error_number : EIO, is_new = flags & O_CREAT && inode_of(path) == 0;
  if (!is_to_fail(flags & (O_CREAT | O_TRUNC) ? CREATE : OPEN, path)) {
    descriptor = REAL(openat)(in, name, flags, mode);
    error = errno;
    if (descriptor >= 0 && is_new) record(CREATE, path, "", inode_of_descriptor(descriptor), 0, "", 0);
    if (descriptor >= 0 && !is_new && flags & O_TRUNC)
      record(TRUNCATE, path, "", inode_of_descriptor(descriptor), 0, "", 0);
  }
  pthread_mutex_unlock(&mutex);
  errno = error;
  return descriptor;
}

#define OPEN_AS(function)                          \
  int function(const char *name, int flags, ...) { \
    TAKE_MODE(flags)                               \
    return openat(AT_FDCWD, name, flags, mode);    \
  }
OPEN_AS(open)
OPEN_AS(open64)

int openat64(int in, const char *name, int flags, ...) {
  TAKE_MODE(flags)
  return openat(in, name, flags, mode);
}

int creat(const char *name, mode_t mode) { return openat(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode); }

/* Writes at an offset, or where the descriptor stands if it is negative. */
static ssize_t written(int descriptor, const void *bytes, size_t count, off_t offset) {
  ssize_t result = -1;
  char path[PATH_MAX];
  path_of_descriptor(descriptor, path);
  if (!is_watched(path))
    return offset < 0 ? REAL(write)(descriptor, bytes, count) : REAL(pwrite)(descriptor, bytes, count, offset);
  pthread_mutex_lock(&mutex);
  int error = error_number, fails = is_to_fail(WRITE, path);
  if (!fails || error_number == 0) {
    if (fails) count = (count + 1) / 2;
    int at_end = offset < 0 && fcntl(descriptor, F_GETFL) & O_APPEND;
    off_t start = offset >= 0 ? offset : lseek(descriptor, 0, at_end ? SEEK_END : SEEK_CUR);
    result = offset < 0 ? REAL(write)(descriptor, bytes, count) : REAL(pwrite)(descriptor, bytes, count, offset);
    error = errno;
    if (result > 0) record(WRITE, path, "", inode_of_descriptor(descriptor), start, bytes, result);
  }
  pthread_mutex_unlock(&mutex);
  errno = error;
  return result;
}

ssize_t write(int descriptor, const void *bytes, size_t count) { return written(descriptor, bytes, count, -1); }

ssize_t pwrite(int descriptor, const void *bytes, size_t count, off_t offset) {
  return written(descriptor, bytes, count, offset);
}

ssize_t pwrite64(int descriptor, const void *bytes, size_t count, off_t offset) {
  return written(descriptor, bytes, count, offset);
}

/* A short write is allowed: the callers write the rest. */
ssize_t writev(int descriptor, const struct iovec *parts, int count) {
  char path[PATH_MAX];
  path_of_descriptor(descriptor, path);
  if (!is_watched(path)) return REAL(writev)(descriptor, parts, count);
  for (int i = 0; i < count; i++)
    if (parts[i].iov_len > 0) return written(descriptor, parts[i].iov_base, parts[i].iov_len, -1);
  return 0;
}

ssize_t pwritev(int descriptor, const struct iovec *parts, int count, off_t offset) {
  char path[PATH_MAX];
  path_of_descriptor(descriptor, path);
  if (!is_watched(path)) return REAL(pwritev)(descriptor, parts, count, offset);
  for (int i = 0; i < count; i++)
    if (parts[i].iov_len > 0) return written(descriptor, parts[i].iov_base, parts[i].iov_len, offset);
  return 0;
}

ssize_t pwritev64(int descriptor, const struct iovec *parts, int count, off_t offset) {
  return pwritev(descriptor, parts, count, offset);
}

static int may_not_read(int descriptor) {
  char path[PATH_MAX];
  if (fails_at < 0 || !counts_reads) return 0;
  path_of_descriptor(descriptor, path);
  if (!is_watched(path)) return 0;
  pthread_mutex_lock(&mutex);
  int fails = is_to_fail(READ, path) && error_number != 0;
  pthread_mutex_unlock(&mutex);
  errno = error_number;
  return fails;
}

ssize_t read(int descriptor, void *bytes, size_t count) {
  return may_not_read(descriptor) ? -1 : REAL(read)(descriptor, bytes, count);
}

ssize_t pread(int descriptor, void *bytes, size_t count, off_t offset) {
  return may_not_read(descriptor) ? -1 : REAL(pread)(descriptor, bytes, count, offset);
}

ssize_t pread64(int descriptor, void *bytes, size_t count, off_t offset) {
  return may_not_read(descriptor) ? -1 : REAL(pread)(descriptor, bytes, count, offset);
}
