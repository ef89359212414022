/* Loaded into a process by LD_PRELOAD: writes down, in their order, the changes that it makes to the files of one folder.
 *
 * A record: operation (1 byte), length of the path, of the second path (4 bytes each), offset, length of the data (8 bytes each),
 * path, second path, data; numbers as the machine has them. RECORD_FOLDER is watched, RECORD_LOG is written.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

static int out = -1;
static const char *folder;

__attribute__((constructor)) static void start(void) {
    folder = getenv("RECORD_FOLDER");
    const char *name = getenv("RECORD_LOG");
    if (folder && name)
        out = (int)syscall(SYS_openat, AT_FDCWD, name, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

static void put(const void *data, size_t length) {
    const char *at = data;
    while (length) {
        long done = syscall(SYS_write, out, at, length);
        if (done <= 0)
            abort();
        at += done;
        length -= (size_t)done;
    }
}

static int watched(const char *path) {
    return out >= 0 && strncmp(path, folder, strlen(folder)) == 0;
}

static void record(char op, const char *path, const char *second, uint64_t offset, const void *data, uint64_t length) {
    uint32_t paths[2] = {(uint32_t)strlen(path), (uint32_t)strlen(second)};
    uint64_t numbers[2] = {offset, length};
    put(&op, 1);
    put(paths, sizeof paths);
    put(numbers, sizeof numbers);
    put(path, paths[0]);
    put(second, paths[1]);
    put(data, length);
}

static int path_of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = out < 0 ? -1 : readlink(link, path, PATH_MAX - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return watched(path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define PWRITE(name, offset_type)                                                      \
    ssize_t name(int fd, const void *data, size_t length, offset_type offset) {       \
        ssize_t done = REAL(name)(fd, data, length, offset);                          \
        char path[PATH_MAX];                                                           \
        if (done > 0 && path_of(fd, path))                                             \
            record('w', path, "", (uint64_t)offset, data, (uint64_t)done);             \
        return done;                                                                   \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t write(int fd, const void *data, size_t length) {
    ssize_t done = REAL(write)(fd, data, length);
    char path[PATH_MAX];
    if (done > 0 && path_of(fd, path))
        record('w', path, "", (uint64_t)lseek(fd, 0, SEEK_CUR) - (uint64_t)done, data, (uint64_t)done);
    return done;
}

#define FTRUNCATE(name, offset_type)                                                   \
    int name(int fd, offset_type length) {                                             \
        int failed = REAL(name)(fd, length);                                           \
        char path[PATH_MAX];                                                           \
        if (!failed && path_of(fd, path))                                              \
            record('t', path, "", (uint64_t)length, "", 0);                            \
        return failed;                                                                 \
    }
FTRUNCATE(ftruncate, off_t)
FTRUNCATE(ftruncate64, off64_t)

#define SYNC(name)                                                                     \
    int name(int fd) {                                                                 \
        int failed = REAL(name)(fd);                                                   \
        char path[PATH_MAX];                                                           \
        if (!failed && path_of(fd, path))                                              \
            record('s', path, "", 0, "", 0);                                           \
        return failed;                                                                 \
    }
SYNC(fsync)
SYNC(fdatasync)

int rename(const char *from, const char *to) {
    int failed = REAL(rename)(from, to);
    if (!failed && watched(to))
        record('r', from, to, 0, "", 0);
    return failed;
}

int unlink(const char *path) {
    int failed = REAL(unlink)(path);
    if (!failed && watched(path))
        record('u', path, "", 0, "", 0);
    return failed;
}
