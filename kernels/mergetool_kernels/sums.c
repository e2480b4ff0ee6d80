/* Sums over models side by side, in one pass over their stored bytes: what numpy does in seven calls, each through the
 * cache and each asking for the interpreter's lock.
 *
 * The order of additions is fixed by LANES and RUN, and no product is contracted with its sum, so the sums are the same
 * for every instruction set. */

#include "stored.h"

enum { BASE, VARIANT, ONTO, REFERENCE, REFERENCE_BASE, MODELS };
enum { OF_BASE, OF_VARIANT, OF_DELTA, OF_ONTO, OF_REFERENCE, SHARED, SUMS };

INLINE int is_safe(double sum) { return sum > 1e-30 && sum < 1e30; } /* float32 has lost or overflowed no squares */

/* The sums of a run in float64: not finite only where an element, or a difference in float32, is not. */
static void run_wide(const stored *models, const int *kinds, const float *scales, double *sums) {
    for (size_t at = 0; at < RUN; at += LANES) {
        floats values[MODELS] = {0};
        for (int model = 0; model < MODELS; model++)
            if (models[model]) values[model] = load(models[model], kinds[model], at) * scales[model];
        floats deltas = values[VARIANT] - values[BASE], references = values[REFERENCE] - values[REFERENCE_BASE];
        for (int lane = 0; lane < LANES; lane++) {
            double delta = deltas[lane], reference = references[lane];
            double base = values[BASE][lane], variant = values[VARIANT][lane], onto = values[ONTO][lane];
            sums[OF_BASE] += base * base;
            sums[OF_VARIANT] += variant * variant;
            sums[OF_DELTA] += delta * delta;
            sums[OF_ONTO] += onto * onto;
            sums[OF_REFERENCE] += reference * reference;
            sums[SHARED] += delta * reference;
        }
    }
}

/* The sums of a run. Inlined once for two models in bfloat16 without scales, and once for all else. */
INLINE void run(const stored *models, const int *kinds, const float *scales, double *sums, int is_plain) {
    const int base_kind = is_plain ? BFLOAT16 : kinds[BASE], variant_kind = is_plain ? BFLOAT16 : kinds[VARIANT];
    const int has_onto = !is_plain && models[ONTO], has_reference = !is_plain && models[REFERENCE];
    const stored base_at = models[BASE], variant_at = models[VARIANT];
    floats lanes[SUMS] = {0};
    words changed = {0};
    for (size_t at = 0; at < RUN; at += LANES) {
        floats base = load(base_at, base_kind, at), variant = load(variant_at, variant_kind, at);
        if (!is_plain) base *= scales[BASE], variant *= scales[VARIANT];
        floats delta = variant - base;
        lanes[OF_BASE] += base * base;
        lanes[OF_VARIANT] += variant * variant;
        lanes[OF_DELTA] += delta * delta;
        changed |= (words)delta;
        if (has_onto) {
            floats onto = load(models[ONTO], kinds[ONTO], at) * scales[ONTO];
            lanes[OF_ONTO] += onto * onto;
        }
        if (has_reference) {
            floats reference = load(models[REFERENCE], kinds[REFERENCE], at) * scales[REFERENCE];
            reference -= load(models[REFERENCE_BASE], kinds[REFERENCE_BASE], at) * scales[REFERENCE_BASE];
            lanes[OF_REFERENCE] += reference * reference;
            lanes[SHARED] += delta * reference;
        }
    }
    double found[SUMS];
    for (int sum = 0; sum < SUMS; sum++) found[sum] = total(lanes[sum]);
    words bits = changed << 1; /* without the sign of zeros */
    uint32_t any = 0;
    for (int lane = 0; lane < LANES; lane++) any |= bits[lane];
    int safe = is_safe(found[OF_BASE]) && is_safe(found[OF_VARIANT]) && (!any || is_safe(found[OF_DELTA])) &&
               (!has_onto || is_safe(found[OF_ONTO])) && (!has_reference || is_safe(found[OF_REFERENCE]));
    if (!safe) {
        memset(found, 0, sizeof found);
        run_wide(models, kinds, scales, found);
    }
    for (int sum = 0; sum < SUMS; sum++) sums[sum] += found[sum];
}

/* Adds to sums[6]: of the squares of base, variant, delta = variant - base, onto and reference delta, and of delta *
 * reference delta, the deltas in float32. models[5] are base, variant, onto, and the reference with its base, each
 * `count` elements of its kinds[], times its scale; the last three may be NULL, and then their sums are left as they are. */
EVERY_PROCESSOR EXPORTED
void mergetool_sums(const stored *models, const int *kinds, const float *scales, size_t count, double *sums) {
    const int is_plain = kinds[BASE] == BFLOAT16 && kinds[VARIANT] == BFLOAT16 && !models[ONTO] && !models[REFERENCE] &&
                         scales[BASE] == 1 && scales[VARIANT] == 1;
    unsigned char padded[MODELS][4 * RUN];
    for (size_t at = 0; at < count; at += RUN) {
        stored here[MODELS];
        for (int model = 0; model < MODELS; model++) {
            size_t bytes = width(kinds[model]), rest = (count - at) * bytes;
            here[model] = models[model] ? models[model] + at * bytes : NULL;
            if (here[model] && count - at < RUN) {
                memset(padded[model], 0, sizeof padded[model]);
                memcpy(padded[model], here[model], rest);
                here[model] = padded[model];
            }
        }
        if (is_plain)
            run(here, kinds, scales, sums, 1);
        else
            run(here, kinds, scales, sums, 0);
    }
}

/* Who compiled this, and which copies of EVERY_PROCESSOR's functions run here: for people who ask why a merge is slow. */
EXPORTED const char *mergetool_compiler(void) {
#ifdef __clang__
    return "Clang " __clang_version__;
#else
    return "GCC " __VERSION__;
#endif
}

EXPORTED const char *mergetool_instructions(void) {
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__)
    __builtin_cpu_init();
#if __GNUC__ >= 12 && !defined(__clang__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return "AVX-512";
#endif
    return __builtin_cpu_supports("avx2") ? "AVX2" : "SSE2, as this processor has no AVX2";
#elif defined(__x86_64__)
    return "SSE2, as this system's libraries cannot choose";
#elif defined(__aarch64__)
    return "NEON";
#else
    return "those that every processor of this kind has";
#endif
}
