// Random reads of 4 KiB, 32 in flight, past the cache, from $SPEED_DISK (default /dev/vda).
#define _GNU_SOURCE
#include "speed.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { DEPTH = 32, BLOCK = 4096 };

static int disk;
static uint64_t blocks, seed = 88172645463325252u;
static aio_context_t context;
static struct iocb request[DEPTH];
static char buffer[DEPTH][BLOCK] __attribute__((aligned(BLOCK)));

static void submit(int slot) {
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    struct iocb *r = &request[slot], *list = r;
    memset(r, 0, sizeof *r);
    r->aio_data = slot;
    r->aio_lio_opcode = IOCB_CMD_PREAD;
    r->aio_fildes = disk;
    r->aio_buf = (uintptr_t)buffer[slot];
    r->aio_nbytes = BLOCK;
    r->aio_offset = seed % blocks * BLOCK;
    if (syscall(SYS_io_submit, context, 1, &list) != 1) fail("io_submit");
}

static void setup(void) {
    const char *path = getenv("SPEED_DISK");
    if (!path) path = "/dev/vda";
    disk = open(path, O_RDONLY | O_DIRECT);
    // A file system in memory may have no way past the cache.
    if (disk < 0 && errno == EINVAL) disk = open(path, O_RDONLY);
    if (disk < 0) fail(path);
    off_t size = lseek(disk, 0, SEEK_END);
    if (size < BLOCK) fail("lseek");
    blocks = size / BLOCK;
    if (syscall(SYS_io_setup, DEPTH, &context)) fail("io_setup");
    for (int i = 0; i < DEPTH; i++) submit(i);
}

// Unit: reads.
static double random_reads(void) {
    struct io_event done[DEPTH];
    int reads = 0;
    while (reads < 256) {
        long n = syscall(SYS_io_getevents, context, 1, DEPTH, done, 0);
        if (n < 1) fail("io_getevents");
        for (long i = 0; i < n; i++) {
            if ((long)done[i].res != BLOCK) fail("read");
            submit(done[i].data);
        }
        reads += n;
    }
    return reads;
}

const struct row disk_rows[] = {{"disk-4k", setup, random_reads}, {0, 0, 0}};
