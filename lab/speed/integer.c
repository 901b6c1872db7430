// Integer work: a sieve and a sort.
#include "speed.h"
#include <string.h>

enum { LIMIT = 300000, COUNT = 20000 };

// The sieve of Eratosthenes. Unit: numbers examined.
static double sieve(void) {
    unsigned char composite[LIMIT];
    memset(composite, 0, sizeof composite);
    unsigned primes = 0;
    for (unsigned i = 2; i < LIMIT; i++) {
        if (composite[i]) continue;
        primes++;
        for (uint64_t j = (uint64_t)i * i; j < LIMIT; j += i) composite[j] = 1;
    }
    KEEP(primes);
    return LIMIT;
}

static void quicksort(uint32_t *a, long n) {
    while (n > 16) {
        uint32_t pivot = a[n / 2];
        long i = 0, j = n - 1;
        for (;;) {
            while (a[i] < pivot) i++;
            while (a[j] > pivot) j--;
            if (i >= j) break;
            uint32_t t = a[i];
            a[i++] = a[j];
            a[j--] = t;
        }
        long left = j + 1;
        if (left < n - left) {
            quicksort(a, left);
            a += left;
            n -= left;
        } else {
            quicksort(a + left, n - left);
            n = left;
        }
    }
    for (long i = 1; i < n; i++) {
        uint32_t x = a[i];
        long j = i;
        for (; j > 0 && a[j - 1] > x; j--) a[j] = a[j - 1];
        a[j] = x;
    }
}

// Quicksort of random numbers. Unit: numbers sorted.
static double sort(void) {
    static uint32_t seed = 1;
    uint32_t a[COUNT], x = seed++;
    for (int i = 0; i < COUNT; i++) {
        x ^= x << 13, x ^= x >> 17, x ^= x << 5;
        a[i] = x;
    }
    quicksort(a, COUNT);
    for (int i = 1; i < COUNT; i++)
        if (a[i - 1] > a[i]) __builtin_trap();
    return COUNT;
}

const struct row integer_rows[] = {{"sieve", 0, sieve}, {"sort", 0, sort}, {0, 0, 0}};
