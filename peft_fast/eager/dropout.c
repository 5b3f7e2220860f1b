// Dropout on the CPU. Element i of a mask has 16 random bits of its own and is dropped where they lie below the
// threshold. The bits are those of SFC64 (Doty-Humphrey, PractRand), eight generators side by side so that vector units
// step them together, started anew for each chunk of elements from (seed, chunk, generator) as SFC64 is from three
// numbers: so any thread can make any chunk, and a mask does not depend on the pieces in which it is made.
//
// It is plain C for any machine, written so that compilers vectorise it.

#include <stdint.h>
#include <string.h>

#define GENERATORS 8
#define STEPS 128
#define MIXING_STEPS 18
#define CHUNK (4 * GENERATORS * STEPS)  // elements
#define PARALLEL_FROM (4 * CHUNK)       // elements: fewer take one thread less time than waking another does

static void draw_chunk(uint64_t seed, uint64_t chunk, uint16_t *words)
{
    uint64_t a[GENERATORS], b[GENERATORS], c[GENERATORS], counter[GENERATORS], drawn[GENERATORS];
    for (int j = 0; j < GENERATORS; j++) {
        a[j] = seed;
        b[j] = chunk;
        c[j] = j;
        counter[j] = 1;
    }
    for (int step = -MIXING_STEPS; step < STEPS; step++) {
        for (int j = 0; j < GENERATORS; j++) {
            drawn[j] = a[j] + b[j] + counter[j]++;
            a[j] = b[j] ^ (b[j] >> 11);
            b[j] = c[j] + (c[j] << 3);
            c[j] = ((c[j] << 24) | (c[j] >> 40)) + drawn[j];
        }
        if (step >= 0)
            memcpy(words + 4 * GENERATORS * step, drawn, sizeof drawn);
    }
}

// out = mask * scale * x for the n elements from number `first` on; x may be out. A value is kept or cleared by its
// bits: of a condition in its place compilers for older vector units make a branch for each element.
#define DROP(NAME, TYPE, BITS, VALUE)                                                                              \
    void NAME(TYPE *out, const TYPE *x, int64_t n, int64_t first, uint64_t seed, uint32_t threshold, double scale, \
              int threads)                                                                                         \
    {                                                                                                              \
        (void)scale, (void)threads;                                                                                \
        _Pragma("omp parallel for num_threads(threads) if (n >= PARALLEL_FROM)")                                   \
        for (int64_t chunk = first / CHUNK; chunk <= (first + n - 1) / CHUNK; chunk++) {                           \
            uint16_t words[CHUNK];                                                                                 \
            draw_chunk(seed, chunk, words);                                                                        \
            int64_t start = chunk * CHUNK - first, begin = start < 0 ? 0 : start;                                  \
            int64_t end = n - start < CHUNK ? n : start + CHUNK;                                                   \
            for (int64_t i = begin; i < end; i++) {                                                                \
                TYPE value = VALUE;                                                                                \
                BITS bits;                                                                                         \
                memcpy(&bits, &value, sizeof bits);                                                                \
                bits &= -(BITS)(words[i - start] >= threshold);                                                    \
                memcpy(out + i, &bits, sizeof bits);                                                               \
            }                                                                                                      \
        }                                                                                                          \
    }

DROP(drop_float32, float, uint32_t, x[i] * (float)scale)
DROP(drop_float64, double, uint64_t, x[i] * scale)
DROP(drop_16, uint16_t, uint16_t, x[i])  // bfloat16 and float16, not scaled
DROP(drop_8, uint8_t, uint8_t, x[i])     // bytes and booleans, not scaled
