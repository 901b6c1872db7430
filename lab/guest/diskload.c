// Loads a disk past the cache: diskload DEVICE DEPTH BLOCK SEQUENTIAL REQUESTS. Prints requests and bytes a second, and the
// nanoseconds that a request took on average from its submission.
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 64 };

static struct iocb request[MOST];
static uint64_t begun[MOST], blocks, next, seed = 88172645463325252u;
static int disk, sequential;
static long block;
static char *buffer;
static aio_context_t context;

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void submit(int slot) {
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    struct iocb *r = &request[slot];
    memset(r, 0, sizeof *r);
    r->aio_data = slot;
    r->aio_lio_opcode = IOCB_CMD_PREAD;
    r->aio_fildes = disk;
    r->aio_buf = (uintptr_t)(buffer + slot * block);
    r->aio_nbytes = block;
    r->aio_offset = (sequential ? next++ : seed) % blocks * block;
    begun[slot] = now();
    if (syscall(SYS_io_submit, context, 1, &r) != 1) fail("io_submit");
}

int main(int argc, char **argv) {
    if (argc != 6) return fprintf(stderr, "diskload DEVICE DEPTH BLOCK SEQUENTIAL REQUESTS\n"), 2;
    int depth = atoi(argv[2]);
    long wanted = atol(argv[5]);
    block = atol(argv[3]), sequential = atoi(argv[4]);
    if (depth < 1 || depth > MOST || block < 512 || wanted < depth) return 2;
    disk = open(argv[1], O_RDONLY | O_DIRECT);
    if (disk < 0) fail(argv[1]);
    blocks = lseek(disk, 0, SEEK_END) / block;
    if (!blocks || posix_memalign((void **)&buffer, 4096, depth * block)) fail("setup");
    if (syscall(SYS_io_setup, MOST, &context)) fail("io_setup");
    uint64_t start = now(), taken = 0;
    long sent = 0, done = 0;
    for (; sent < depth; sent++) submit(sent);
    while (done < wanted) {
        struct io_event events[MOST];
        long n = syscall(SYS_io_getevents, context, 1, MOST, events, 0);
        if (n < 1) fail("io_getevents");
        uint64_t at = now();
        for (long i = 0; i < n; i++) {
            if ((long)events[i].res != block) return fprintf(stderr, "read: %ld\n", (long)events[i].res), 1;
            taken += at - begun[events[i].data];
            if (sent < wanted) submit(events[i].data), sent++;
        }
        done += n;
    }
    double seconds = (now() - start) / 1e9;
    printf("iops=%.0f mbps=%.1f latency_ns=%.0f\n", done / seconds, done * block / seconds / 1e6, (double)taken / done);
}
