// What an operating system is asked for.
#define _GNU_SOURCE
#include "speed.h"
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

// Unit: system calls.
static double getpid_row(void) {
    for (int i = 0; i < 2000; i++) syscall(SYS_getpid);
    return 2000;
}

// A process that is made, becomes another program and ends. Unit: processes.
static double forks(void) {
    for (int i = 0; i < 5; i++) {
        pid_t child = fork();
        if (child < 0) fail("fork");
        if (!child) {
            execl("/speed/speed", "speed", "nothing", (char *)0);
            _exit(127);
        }
        int status;
        if (waitpid(child, &status, 0) != child || status) fail("fork, exec and wait");
    }
    return 5;
}

static int there[2], back[2];

static void pipes(void) {
    cpu_set_t one;
    CPU_ZERO(&one);
    int cpu = sched_getcpu();
    CPU_SET(cpu < 0 ? 0 : cpu, &one);
    if (sched_setaffinity(0, sizeof one, &one)) fail("sched_setaffinity");
    if (pipe(there) || pipe(back)) fail("pipe");
    pid_t child = fork();
    if (child < 0) fail("fork");
    if (!child) {
        char byte;
        close(there[1]);
        while (read(there[0], &byte, 1) == 1)
            if (write(back[1], &byte, 1) != 1) break;
        _exit(0);
    }
    close(there[0]);
}

// A byte to another process on the same processor, and back. Unit: round trips.
static double ping_pong(void) {
    char byte = 1;
    for (int i = 0; i < 100; i++)
        if (write(there[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1) fail("pipe");
    return 100;
}

// Maps a megabyte, touches its pages and unmaps it. Unit: pages.
static double map_touch(void) {
    enum { SIZE = 1 << 20, PAGE = 4096 };
    volatile char *at = mmap(0, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) fail("mmap");
    madvise((void *)at, SIZE, MADV_NOHUGEPAGE);
    for (int i = 0; i < SIZE; i += PAGE) at[i] = 1;
    munmap((void *)at, SIZE);
    return SIZE / PAGE;
}

const struct row system_rows[] = {
    {"getpid", 0, getpid_row},
    {"fork-exec", 0, forks},
    {"pipe", pipes, ping_pong},
    {"mmap-touch", 0, map_touch},
    {0, 0, 0},
};
