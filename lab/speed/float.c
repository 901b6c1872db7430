// Floating point: matrix products with each instruction set, and gravity. Compiled with -ffp-contract=off.
#include "speed.h"
#include <immintrin.h>
#include <math.h>

enum { N = 64 };

static double a[N][N] __attribute__((aligned(64))), b[N][N] __attribute__((aligned(64))), c[N][N] __attribute__((aligned(64)));

static void fill(void) {
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) {
            // Not exact in binary, as measured values are not: emulators treat exact sums differently.
            a[i][j] = ((i * 7 + j) % 11 + 1) / 3.0;
            b[i][j] = ((i + j * 3) % 13 + 1) / 7.0;
        }
}

// Four rows by two vectors of C at once, so that the arithmetic and not the memory is the limit. Unit: operations.
#define PRODUCT(NAME, TARGET, VECTOR, WIDTH, ZERO, LOAD, BROADCAST, STORE, ACCUMULATE)   \
    __attribute__((target(TARGET))) static double NAME(void) {                           \
        for (int i = 0; i < N; i += 4)                                                   \
            for (int j = 0; j < N; j += 2 * WIDTH) {                                     \
                VECTOR s[4][2];                                                          \
                for (int r = 0; r < 4; r++) s[r][0] = s[r][1] = ZERO();                  \
                for (int k = 0; k < N; k++) {                                            \
                    VECTOR b0 = LOAD(&b[k][j]), b1 = LOAD(&b[k][j + WIDTH]);             \
                    _Pragma("GCC unroll 4") for (int r = 0; r < 4; r++) {                \
                        VECTOR x = BROADCAST(&a[i + r][k]);                              \
                        s[r][0] = ACCUMULATE(x, b0, s[r][0]);                            \
                        s[r][1] = ACCUMULATE(x, b1, s[r][1]);                            \
                    }                                                                    \
                }                                                                        \
                for (int r = 0; r < 4; r++) {                                            \
                    STORE(&c[i + r][j], s[r][0]);                                        \
                    STORE(&c[i + r][j + WIDTH], s[r][1]);                                \
                }                                                                        \
            }                                                                            \
        return 2.0 * N * N * N;                                                          \
    }

#define ADD_MUL_128(x, y, s) _mm_add_pd(_mm_mul_pd(x, y), s)
#define ADD_MUL_256(x, y, s) _mm256_add_pd(_mm256_mul_pd(x, y), s)
PRODUCT(product_sse2, "sse2", __m128d, 2, _mm_setzero_pd, _mm_load_pd, _mm_load1_pd, _mm_store_pd, ADD_MUL_128)
PRODUCT(product_avx2, "avx2", __m256d, 4, _mm256_setzero_pd, _mm256_load_pd, _mm256_broadcast_sd, _mm256_store_pd, ADD_MUL_256)
PRODUCT(product_fma, "avx2,fma", __m256d, 4, _mm256_setzero_pd, _mm256_load_pd, _mm256_broadcast_sd, _mm256_store_pd, _mm256_fmadd_pd)

// The same on the x87 stack. Unit: operations.
__attribute__((target("fpmath=387"))) static double product_x87(void) {
    enum { M = 32 };
    for (int i = 0; i < M; i++)
        for (int j = 0; j < M; j++) {
            double sum = 0;
            for (int k = 0; k < M; k++) sum += a[i][k] * b[k][j];
            c[i][j] = sum;
        }
    return 2.0 * M * M * M;
}

static struct body {
    double x[3], v[3], mass;
} bodies[5];

static void heavens(void) {
    for (int i = 0; i < 5; i++)
        for (int k = 0; k < 3; k++) {
            bodies[i].x[k] = (i + 1) * (k + 1.5) * (i & 1 ? -1.3 : 1.1);
            bodies[i].v[k] = (i - 2) * (k - 1) * 0.01;
            bodies[i].mass = 1.0 / (i + 1);
        }
}

// Gravity between five bodies, scalar. Unit: steps.
static double nbody(void) {
    for (int step = 0; step < 500; step++) {
        for (int i = 0; i < 5; i++)
            for (int j = i + 1; j < 5; j++) {
                double d[3], square = 0;
                for (int k = 0; k < 3; k++) {
                    d[k] = bodies[i].x[k] - bodies[j].x[k];
                    square += d[k] * d[k];
                }
                double magnitude = 1e-4 / (square * sqrt(square));
                for (int k = 0; k < 3; k++) {
                    bodies[i].v[k] -= d[k] * bodies[j].mass * magnitude;
                    bodies[j].v[k] += d[k] * bodies[i].mass * magnitude;
                }
            }
        for (int i = 0; i < 5; i++)
            for (int k = 0; k < 3; k++) bodies[i].x[k] += 1e-4 * bodies[i].v[k];
    }
    KEEP(bodies[0].x[0]);
    return 500;
}

const struct row float_rows[] = {
    {"product-sse2", fill, product_sse2}, {"product-avx2", fill, product_avx2}, {"product-fma", fill, product_fma},
    {"product-x87", fill, product_x87},   {"nbody", heavens, nbody},            {0, 0, 0},
};
