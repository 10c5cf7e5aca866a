/* Counts the calls by which a process writes to a folder, or reads from it, and spoils one of them.

   cc -shared -fPIC -o libsyscalls.so syscalls.c -ldl, then LD_PRELOAD=./libsyscalls.so. Nothing is
   counted until the process calls arm(). What a C library writes by its own buffers (fwrite) passes
   by uncounted; Python and Rust call the functions that stand here. tests/syscalls.py is the other
   half. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

/* What becomes of the call: it is done, it fails, half of its bytes are done, the process is killed
   before it, in its middle or behind it. */
enum { DONE, FAIL, SHORT, BEFORE, MIDDLE, AFTER };

static char folder[PATH_MAX];   /* "" while nothing is counted */
static char also[256];          /* ",write,fsync,": which later calls fail, too */
static char spoilt[PATH_MAX];   /* the path of the call that was spoilt */
static int reading, spoil, fault, report = -1;
static long number, count;

/* in: what is counted, with all below it. side: 'r' or 'w'. which: the number of the call that is
   spoilt, from 1 on, or 0. how: one of the above. code: the errno of FAIL. names: which of the
   later calls fail as well, "" for none; of those that read, only calls of the same file. to: the
   descriptor that gets a line for each call. */
void arm(const char *in, int side, long which, int how, int code, const char *names, int to) {
    reading = side == 'r', number = which, spoil = how, fault = code, report = to, count = 0;
    snprintf(also, sizeof also, "%s", names);
    snprintf(folder, sizeof folder, "%s", in);
}

static int below(const char *path) {
    size_t length = strlen(folder);
    return length && !strncmp(path, folder, length) && (!path[length] || path[length] == '/');
}

static void path_of(int fd, char *path) {
    char name[32];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(name, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
}

/* The whole path of what a call names, relative to a folder's descriptor or AT_FDCWD. */
static void absolute(int fd, const char *name, char *path) {
    char base[PATH_MAX] = "";
    int held;
    if (sscanf(name, "/proc/self/fd/%d", &held) == 1) { /* a file that is open already */
        path_of(held, path);
        return;
    }
    if (name[0] != '/' && fd == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) base[0] = 0;
    } else if (name[0] != '/') {
        path_of(fd, base);
    }
    if (snprintf(path, PATH_MAX, "%s%s%s", base, base[0] ? "/" : "", name) >= PATH_MAX) path[0] = 0;
}

static void end(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* Counts a call, tells of it, and says what becomes of it. bytes: how many it writes. */
static int verdict(const char *name, const char *path, size_t bytes) {
    if (!below(path)) return DONE;
    int saved = errno, hit = DONE;
    long n = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
    char quoted[64];
    snprintf(quoted, sizeof quoted, ",%s,", name);
    if (n == number) strcpy(spoilt, path);
    int later = number && n > number && strstr(also, quoted);
    if (n == number || (later && (!reading || !strcmp(path, spoilt)))) hit = spoil;
    dprintf(report, "%ld\t%s\t%zu\t%d\t%s\n", n, name, bytes, hit, path);
    if (hit == BEFORE) end();
    errno = hit == FAIL ? fault : saved;
    return hit;
}

static int verdict_at(const char *name, int fd, const char *relative) {
    char path[PATH_MAX];
    if (!folder[0] || reading || !relative) return DONE;
    absolute(fd, relative, path);
    return verdict(name, path, 0);
}

/* bytes: how many are written. any: a descriptor for reading counts among what writes, too. */
static int verdict_fd(const char *name, int fd, size_t bytes, int any) {
    char path[PATH_MAX];
    if (!folder[0] || reading) return DONE;
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || (!any && (flags & O_ACCMODE) == O_RDONLY && !(flags & O_DIRECTORY)))
        return DONE;
    path_of(fd, path);
    return verdict(name, path, bytes);
}

static int verdict_read(const char *name, int fd, const char *relative) {
    char path[PATH_MAX];
    if (!folder[0] || !reading) return DONE;
    if (relative && relative[0]) absolute(fd, relative, path);
    else path_of(fd, path);
    return verdict(name, path, 0);
}

static int verdict_open(int fd, const char *name, int flags) {
    int writes = (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC | O_DIRECTORY);
    if (!writes) return verdict_read("open", fd, name);
    return verdict_at("open", fd, name);
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

/* A function whose call is done, fails or is followed by the end. */
#define WRAP(type, name, parameters, arguments, judged) \
    type name parameters { \
        REAL(name); \
        int hit = judged; \
        if (hit == FAIL) return -1; \
        type result = real arguments; \
        if (hit == AFTER) end(); \
        return result; \
    }

/* One that writes `size` bytes, of which it may do a half. */
#define WRAP_BYTES(name, parameters, arguments, half, fd, size) \
    ssize_t name parameters { \
        REAL(name); \
        int hit = verdict_fd(#name, fd, size, 0); \
        if (hit == FAIL) return -1; \
        ssize_t result = hit == SHORT || hit == MIDDLE ? real half : real arguments; \
        if (hit == MIDDLE || hit == AFTER) end(); \
        return result; \
    }

#define OPEN(name, parameters, before, fd) \
    int name parameters { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        int hit = verdict_open(fd, path, flags); \
        if (hit == FAIL) return -1; \
        int result = real before; \
        if (hit == AFTER) end(); \
        return result; \
    }

OPEN(open, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(openat, (int fd, const char *path, int flags, ...), (fd, path, flags, mode), fd)
OPEN(openat64, (int fd, const char *path, int flags, ...), (fd, path, flags, mode), fd)
WRAP(int, creat, (const char *path, mode_t mode), (path, mode),
     verdict_open(AT_FDCWD, path, O_WRONLY | O_CREAT))

WRAP_BYTES(write, (int fd, const void *data, size_t size), (fd, data, size), (fd, data, size / 2),
           fd, size)
WRAP_BYTES(pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at),
           (fd, data, size / 2, at), fd, size)
WRAP_BYTES(pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at),
           (fd, data, size / 2, at), fd, size)
WRAP_BYTES(writev, (int fd, const struct iovec *parts, int n), (fd, parts, n),
           (fd, parts, (n + 1) / 2), fd, n)
WRAP_BYTES(sendfile, (int fd, int from, off_t *at, size_t size), (fd, from, at, size),
           (fd, from, at, 1), fd, size)
WRAP_BYTES(sendfile64, (int fd, int from, off64_t *at, size_t size), (fd, from, at, size),
           (fd, from, at, 1), fd, size)
WRAP_BYTES(copy_file_range, (int from, off64_t *out, int fd, off64_t *at, size_t size,
                             unsigned flags), (from, out, fd, at, size, flags),
           (from, out, fd, at, 1, flags), fd, size)

WRAP(int, fsync, (int fd), (fd), verdict_fd("fsync", fd, 0, 1))
WRAP(int, fdatasync, (int fd), (fd), verdict_fd("fsync", fd, 0, 1))
WRAP(int, flock, (int fd, int what), (fd, what), verdict_fd("flock", fd, 0, 1))
WRAP(int, ftruncate, (int fd, off_t size), (fd, size), verdict_fd("ftruncate", fd, 0, 1))
WRAP(int, ftruncate64, (int fd, off64_t size), (fd, size), verdict_fd("ftruncate", fd, 0, 1))
WRAP(int, futimens, (int fd, const struct timespec times[2]), (fd, times),
     verdict_fd("utime", fd, 0, 1))
WRAP(int, fchmod, (int fd, mode_t mode), (fd, mode), verdict_fd("chmod", fd, 0, 1))

int close(int fd) { /* one that fails has closed the file all the same */
    REAL(close);
    int hit = verdict_fd("close", fd, 0, 0);
    int result = real(fd);
    if (hit == AFTER) end();
    if (hit == FAIL) errno = fault;
    return hit == FAIL ? -1 : result;
}

WRAP(int, rename, (const char *old, const char *path), (old, path),
     verdict_at("rename", AT_FDCWD, path))
WRAP(int, renameat, (int from, const char *old, int to, const char *path), (from, old, to, path),
     verdict_at("rename", to, path))
WRAP(int, renameat2, (int from, const char *old, int to, const char *path, unsigned flags),
     (from, old, to, path, flags), verdict_at("rename", to, path))
WRAP(int, unlink, (const char *path), (path), verdict_at("unlink", AT_FDCWD, path))
WRAP(int, unlinkat, (int fd, const char *path, int flags), (fd, path, flags),
     verdict_at("unlink", fd, path))
WRAP(int, rmdir, (const char *path), (path), verdict_at("unlink", AT_FDCWD, path))
WRAP(int, mkdir, (const char *path, mode_t mode), (path, mode),
     verdict_at("mkdir", AT_FDCWD, path))
WRAP(int, mkdirat, (int fd, const char *path, mode_t mode), (fd, path, mode),
     verdict_at("mkdir", fd, path))
WRAP(int, link, (const char *old, const char *path), (old, path),
     verdict_at("link", AT_FDCWD, path))
WRAP(int, linkat, (int from, const char *old, int to, const char *path, int flags),
     (from, old, to, path, flags), verdict_at("link", to, path))
WRAP(int, symlink, (const char *old, const char *path), (old, path),
     verdict_at("link", AT_FDCWD, path))
WRAP(int, symlinkat, (const char *old, int to, const char *path), (old, to, path),
     verdict_at("link", to, path))
WRAP(int, utimensat, (int fd, const char *path, const struct timespec times[2], int flags),
     (fd, path, times, flags), verdict_at("utime", fd, path))
WRAP(int, chmod, (const char *path, mode_t mode), (path, mode),
     verdict_at("chmod", AT_FDCWD, path))
WRAP(int, truncate64, (const char *path, off64_t size), (path, size),
     verdict_at("ftruncate", AT_FDCWD, path))

/* ------------------------------------------------------------------------------ what reads */

WRAP(ssize_t, read, (int fd, void *data, size_t size), (fd, data, size),
     verdict_read("read", fd, NULL))
WRAP(ssize_t, pread, (int fd, void *data, size_t size, off_t at), (fd, data, size, at),
     verdict_read("read", fd, NULL))
WRAP(ssize_t, pread64, (int fd, void *data, size_t size, off64_t at), (fd, data, size, at),
     verdict_read("read", fd, NULL))
WRAP(ssize_t, preadv64v2, (int fd, const struct iovec *parts, int n, off64_t at, int flags),
     (fd, parts, n, at, flags), verdict_read("read", fd, NULL))
WRAP(int, fstat, (int fd, struct stat *status), (fd, status), verdict_read("fstat", fd, NULL))
WRAP(int, fstat64, (int fd, struct stat64 *status), (fd, status), verdict_read("fstat", fd, NULL))
WRAP(int, stat, (const char *path, struct stat *status), (path, status),
     verdict_read("stat", AT_FDCWD, path))
WRAP(int, stat64, (const char *path, struct stat64 *status), (path, status),
     verdict_read("stat", AT_FDCWD, path))
WRAP(int, lstat64, (const char *path, struct stat64 *status), (path, status),
     verdict_read("stat", AT_FDCWD, path))
WRAP(int, fstatat64, (int fd, const char *path, struct stat64 *status, int flags),
     (fd, path, status, flags), verdict_read(path[0] ? "stat" : "fstat", fd, path))
WRAP(int, statx, (int fd, const char *path, int flags, unsigned mask, struct statx *status),
     (fd, path, flags, mask, status), verdict_read(path[0] ? "stat" : "fstat", fd, path))

DIR *opendir(const char *path) {
    REAL(opendir);
    return verdict_read("opendir", AT_FDCWD, path) == FAIL ? NULL : real(path);
}

/* glibc's mmap and mmap64 are one function here, and dlsym may be what calls it. */
void *mmap64(void *at, size_t size, int protection, int flags, int fd, off64_t offset) {
    REAL(mmap64);
    if (fd >= 0 && verdict_read("mmap", fd, NULL) == FAIL) return MAP_FAILED;
    return real(at, size, protection, flags, fd, offset);
}
void *mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset) {
    REAL(mmap);
    if (fd >= 0 && verdict_read("mmap", fd, NULL) == FAIL) return MAP_FAILED;
    return real(at, size, protection, flags, fd, offset);
}
