// Hard work for a processor, its caches of translations and its memory management; every result is checked.
//
//   stress patch SECONDS    programs that write, move and replace their own code, on several threads
//   stress forks COUNT      processes that share and copy memory
//   stress maps SECONDS     pages that come, go and change their rights under running threads
//   stress vectors SECONDS  vector and x87 registers kept across switches between threads
//   stress clocks SECONDS   clocks that never go back, whichever processor reads them
//   stress faults COUNT     faults handled by the program, with every register as it was
#define _GNU_SOURCE
#include <immintrin.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

enum { PAGE = 4096, THREADS = 4 };

static void bad(const char *what, long detail) {
    char text[160];
    int n = snprintf(text, sizeof text, "STRESS-WRONG %s %ld\n", what, detail);
    if (write(1, text, n) < 0) _exit(3);
    _exit(2);
}

static void *pages(size_t size, int rights) {
    void *at = mmap(0, size, rights, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) bad("mmap", size);
    return at;
}

static double deadline;

static int over(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9 >= deadline;
}

static void until(double seconds) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    deadline = t.tv_sec + t.tv_nsec * 1e-9 + seconds;
}

static void on_threads(void *(*body)(void *)) {
    pthread_t thread[THREADS];
    for (long i = 0; i < THREADS; i++)
        if (pthread_create(&thread[i], 0, body, (void *)i)) bad("pthread_create", i);
    for (int i = 0; i < THREADS; i++) pthread_join(thread[i], 0);
}

typedef uint32_t (*function)(void);

// mov eax, value; ret
static void emit(unsigned char *at, uint32_t value) {
    at[0] = 0xb8;
    memcpy(at + 1, &value, 4);
    at[5] = 0xc3;
}

static uint32_t run(unsigned char *at) { return ((function)(uintptr_t)at)(); }

// A function whose constant another thread replaces: an aligned word, so that a caller sees one or the other.
static _Atomic uint32_t *shared_constant;
static unsigned char *shared_code;

static void *patches(void *number) {
    long me = (long)number;
    unsigned char *code = pages(4 * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC);
    uint32_t seed = me + 1;
    while (!over()) {
        for (int round = 0; round < 300; round++) {
            seed = seed * 1664525 + 1013904223;
            // Across a page boundary too.
            unsigned char *at = code + (round % 7 == 0 ? PAGE - 1 - seed % 5 : seed % (3 * PAGE));
            emit(at, seed);
            if (run(at) != seed) bad("patched code", round);
            at[1] ^= 0x55;
            if (run(at) != (seed ^ 0x55)) bad("patched constant", round);
        }
        // Elsewhere with other rights, then gone; the next code comes to lie in the same place.
        unsigned char *fresh = pages(PAGE, PROT_READ | PROT_WRITE);
        emit(fresh, seed);
        if (mprotect(fresh, PAGE, PROT_READ | PROT_EXEC)) bad("mprotect", 0);
        if (run(fresh) != seed) bad("protected code", 0);
        if (mprotect(fresh, PAGE, PROT_READ | PROT_WRITE)) bad("mprotect", 1);
        emit(fresh, ~seed);
        if (mprotect(fresh, PAGE, PROT_READ | PROT_EXEC)) bad("mprotect", 2);
        if (run(fresh) != ~seed) bad("rewritten code", 0);
        munmap(fresh, PAGE);
        if (me == 0) {
            atomic_store(shared_constant, 0x1000 + (seed & 0xfff));
            if (run(shared_code) != 0x1000 + (seed & 0xfff)) bad("own cross-modification", 0);
        } else {
            uint32_t seen = run(shared_code);
            if (seen < 0x1000 || seen > 0x1fff) bad("cross-modified code", seen);
        }
    }
    return 0;
}

static void patch(double seconds) {
    until(seconds);
    shared_code = pages(PAGE, PROT_READ | PROT_WRITE | PROT_EXEC);
    // The constant aligned to its size.
    shared_code += 3;
    emit(shared_code, 0x1000);
    shared_constant = (void *)(shared_code + 1);
    on_threads(patches);
}

static void forks(long count) {
    uint32_t *memory = pages(64 * PAGE, PROT_READ | PROT_WRITE);
    for (int i = 0; i < 64 * PAGE / 4; i++) memory[i] = i * 2654435761u;
    for (long n = 0; n < count; n += 4) {
        pid_t child[4];
        for (int c = 0; c < 4; c++) {
            child[c] = fork();
            if (child[c] < 0) bad("fork", n);
            if (child[c]) continue;
            // Copies on write must not be seen by the others.
            for (int i = c; i < 64 * PAGE / 4; i += 97) memory[i] += n + c;
            for (int i = 0; i < 64 * PAGE / 4; i++) {
                uint32_t want = i * 2654435761u + (i % 97 == c ? n + c : 0);
                if (memory[i] != want) _exit(99);
            }
            _exit(10 + c);
        }
        for (int c = 0; c < 4; c++) {
            int status;
            if (waitpid(child[c], &status, 0) != child[c]) bad("waitpid", n);
            if (status != (10 + c) << 8) bad("child's memory", status);
        }
    }
    for (int i = 0; i < 64 * PAGE / 4; i++)
        if (memory[i] != i * 2654435761u) bad("parent's memory", i);
}

static volatile uint64_t *board;

static void *mapper(void *number) {
    long me = (long)number;
    uint64_t seed = me + 7;
    while (!over()) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        size_t size = (1 + (seed >> 40) % 64) * PAGE;
        uint64_t *at = pages(size, PROT_READ | PROT_WRITE);
        for (size_t i = 0; i < size / 8; i += PAGE / 8) {
            if (at[i]) bad("fresh page is not zero", i);
            at[i] = seed ^ i;
        }
        board[me] = seed;
        if (mprotect(at, size, PROT_READ)) bad("mprotect", 3);
        for (size_t i = 0; i < size / 8; i += PAGE / 8)
            if (at[i] != (seed ^ i)) bad("page", i);
        if (seed >> 63) {
            uint64_t *moved = mremap(at, size, size + 4 * PAGE, MREMAP_MAYMOVE);
            if (moved == MAP_FAILED) bad("mremap", size);
            at = moved;
            for (size_t i = 0; i < size / 8; i += PAGE / 8)
                if (at[i] != (seed ^ i)) bad("moved page", i);
            size += 4 * PAGE;
        } else if (seed >> 62) {
            if (madvise(at, size, MADV_DONTNEED)) bad("madvise", size);
            for (size_t i = 0; i < size / 8; i += PAGE / 8)
                if (at[i]) bad("page given back", i);
        }
        munmap(at, size);
        if (board[me] != seed) bad("shared page", me);
    }
    return 0;
}

static void maps(double seconds) {
    until(seconds);
    board = pages(PAGE, PROT_READ | PROT_WRITE);
    on_threads(mapper);
}

__attribute__((target("avx2,fma"), noinline)) static double vector_work(long me) {
    __m256d a = _mm256_set1_pd(1.0 + me), b = _mm256_set_pd(1, 2, 3, 4), c = _mm256_setzero_pd();
    long double x = 1.0L + me;
    for (int i = 0; i < 20000; i++) {
        c = _mm256_fmadd_pd(a, b, c);
        a = _mm256_div_pd(_mm256_add_pd(a, b), _mm256_set1_pd(2.5));
        x = x * 1.0000001L + 1e-9L;
    }
    double out[4];
    _mm256_storeu_pd(out, _mm256_add_pd(a, c));
    return out[0] + out[1] * 3 + out[2] * 5 + out[3] * 7 + (double)x;
}

static void *vectors_body(void *number) {
    long me = (long)number;
    double want = vector_work(me);
    while (!over())
        if (vector_work(me) != want) bad("vector result", me);
    return 0;
}

static void vectors(double seconds) {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return;
    until(seconds);
    on_threads(vectors_body);
}

static unsigned char *guarded;
static volatile long handled;

static void on_fault(int signal, siginfo_t *info, void *context) {
    (void)signal;
    ucontext_t *u = context;
    if ((unsigned char *)info->si_addr < guarded || (unsigned char *)info->si_addr >= guarded + PAGE)
        bad("fault address", (long)info->si_addr);
    // Registers that the loop set up must be exactly these when it faults.
    if (u->uc_mcontext.gregs[REG_R12] != 0x1122334455667788) bad("R12 at a fault", u->uc_mcontext.gregs[REG_R12]);
    if (u->uc_mcontext.gregs[REG_R13] != handled) bad("R13 at a fault", u->uc_mcontext.gregs[REG_R13]);
    if (!(u->uc_mcontext.gregs[REG_EFL] & 1)) bad("carry at a fault", u->uc_mcontext.gregs[REG_EFL]);
    handled++;
    mprotect(guarded, PAGE, PROT_READ | PROT_WRITE);
}

static void faults(long count) {
    guarded = pages(PAGE, PROT_NONE);
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
    if (sigaction(SIGSEGV, &action, 0)) bad("sigaction", 0);
    for (long i = 0; i < count; i++) {
        mprotect(guarded, PAGE, PROT_NONE);
        uint64_t after;
        __asm__ volatile("movabs $0x1122334455667788, %%r12\n\tmov %2, %%r13\n\tstc\n\tmovq %%r13, (%1)\n\tsbb %0, %0\n\t"
                         : "=&r"(after)
                         : "r"(guarded + (i * 8) % PAGE), "r"(i)
                         : "r12", "r13", "cc", "memory");
        if (after != ~0ull) bad("carry after a fault", i);
        if (*(long *)(guarded + (i * 8) % PAGE) != i) bad("store after a fault", i);
    }
    if (handled != count) bad("faults handled", handled);
}

static _Atomic int64_t latest[2];

static int64_t read_clock(int which) {
    struct timespec t;
    clock_gettime(which ? CLOCK_REALTIME : CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static void *clock_readers(void *number) {
    (void)number;
    while (!over())
        for (int round = 0; round < 2000; round++) {
            int which = round & 1;
            int64_t seen = atomic_load(&latest[which]);
            int64_t now = read_clock(which);
            // What another thread has read already cannot be later than what is read after that.
            if (now < seen) bad(which ? "the time of day goes back by ns" : "the monotonic clock goes back by ns", seen - now);
            while (seen < now && !atomic_compare_exchange_weak(&latest[which], &seen, now)) {
            }
        }
    return 0;
}

static void clocks(double seconds) {
    int64_t monotonic = read_clock(0), real = read_clock(1);
    until(seconds);
    on_threads(clock_readers);
    int64_t apart = (read_clock(1) - real) - (read_clock(0) - monotonic);
    if (apart > 100000000 || apart < -100000000) bad("clocks drift apart by ns", apart);
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    double amount = atof(argv[2]);
    if (!strcmp(argv[1], "patch")) patch(amount);
    else if (!strcmp(argv[1], "forks")) forks(amount);
    else if (!strcmp(argv[1], "maps")) maps(amount);
    else if (!strcmp(argv[1], "vectors")) vectors(amount);
    else if (!strcmp(argv[1], "clocks")) clocks(amount);
    else if (!strcmp(argv[1], "faults")) faults(amount);
    else return 2;
    printf("STRESS-OK %s\n", argv[1]);
    return 0;
}
