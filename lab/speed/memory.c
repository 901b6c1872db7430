// Memory: streams, copies in and out of the caches, and a chain of dependent loads.
#include "speed.h"
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { WORDS = 1 << 21, SMALL = 4096, BIG = 16 << 20, CHAIN = 1 << 18 };

static void *memory(size_t size) {
    void *at = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) fail("mmap");
    memset(at, 1, size);
    return at;
}

static double *x, *y, *z;
static char *from, *to;
static void **chain;

static void triad_setup(void) {
    x = memory(WORDS * 8), y = memory(WORDS * 8), z = memory(WORDS * 8);
}

// STREAM's triad over 48 MiB. Unit: bytes.
static double triad(void) {
    double factor = 3;
    KEEP(factor);
    for (long i = 0; i < WORDS; i++) x[i] = y[i] + factor * z[i];
    KEEP(x);
    return 24.0 * WORDS;
}

static void copy_setup(void) { from = memory(BIG), to = memory(BIG); }

// The C library's copy, 16 MiB. Unit: bytes.
static double copy_big(void) {
    memcpy(to, from, BIG);
    KEEP(to);
    return BIG;
}

// The C library's copy of a page that stays in the cache. Unit: bytes.
static double copy_small(void) {
    for (int i = 0; i < 5000; i++) {
        memcpy(to, from, SMALL);
        KEEP(to);
    }
    return 5000.0 * SMALL;
}

static void chain_setup(void) {
    // One cycle through all elements (Sattolo), 2 MiB.
    chain = memory(CHAIN * sizeof *chain);
    uint32_t *order = memory(CHAIN * sizeof *order), seed = 7;
    for (uint32_t i = 0; i < CHAIN; i++) order[i] = i;
    for (uint32_t i = CHAIN - 1; i > 0; i--) {
        seed = seed * 1664525 + 1013904223;
        uint32_t j = (uint32_t)(((uint64_t)seed * i) >> 32), t = order[i];
        order[i] = order[j], order[j] = t;
    }
    for (uint32_t i = 0; i < CHAIN; i++) chain[order[i]] = &chain[order[(i + 1) % CHAIN]];
}

// Each load needs the one before. Unit: loads.
static double chase(void) {
    static void **at;
    if (!at) at = chain;
    for (int i = 0; i < 100000; i++) at = *at;
    KEEP(at);
    return 100000;
}

const struct row memory_rows[] = {
    {"triad", triad_setup, triad},          {"memcpy-16m", copy_setup, copy_big}, {"memcpy-4k", copy_setup, copy_small},
    {"pointer-chase", chain_setup, chase}, {0, 0, 0},
};
