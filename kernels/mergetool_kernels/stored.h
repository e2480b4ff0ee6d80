/* Elements as they are stored, eight at a time as float32: any processor, the same bits. */

#ifndef STORED_H
#define STORED_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* One copy of a function for each kind of processor, chosen when the library is loaded. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__)
#if __GNUC__ >= 12 && !defined(__clang__)
#define AVX512 "arch=x86-64-v4",
#else
#define AVX512
#endif
#define EVERY_PROCESSOR __attribute__((target_clones(AVX512 "avx2", "default")))
#else
#define EVERY_PROCESSOR
#endif
/* What ctypes finds: Windows hides every function that is not marked. */
#ifdef _WIN32
#define EXPORTED __declspec(dllexport)
#else
#define EXPORTED
#endif
#define INLINE static inline __attribute__((always_inline))

enum { LANES = 8, RUN = 1024 }; /* 128 products a lane are added up in float32, and runs in float64: within 3e-7 */
enum { FLOAT32, BFLOAT16, FLOAT16, FLOAT8_E4M3, FLOAT8_E5M2 };

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef double doubles __attribute__((vector_size(8 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t octets __attribute__((vector_size(LANES)));
typedef const unsigned char *stored;

INLINE size_t width(int kind) { return kind == FLOAT32 ? 4 : kind <= FLOAT16 && kind >= BFLOAT16 ? 2 : 1; }

INLINE words choose(words mask, words yes, words no) { return (mask & yes) | (~mask & no); }
INLINE words is_less(words a, words b) { return (words)((integers)a < (integers)b); } /* both below 2^31 */

/* The value of a small format's codes, whose exponent and mantissa were moved to where float32 has them: `rebias` is what
 * the exponents differ by. Subnormal codes are normal numbers of float32: one binade up, and a subtraction that is exact. */
INLINE words widened(words magnitude, uint32_t rebias) {
    words normal = magnitude + (rebias << 23);
    floats first = (floats)((words){0} + ((rebias + 1) << 23));
    words subnormal = (words)((floats)(normal + (1u << 23)) - first);
    return choose(is_less(magnitude, (words){0} + (1u << 23)), subnormal, normal);
}

/* A code of a format, in the low bits of each word, as float32: exact, for NaN and infinity too. */
INLINE floats value_of(words code, int kind) {
    words bits, magnitude;
    switch (kind) {
    case FLOAT32:
        return (floats)code;
    case BFLOAT16:
        return (floats)(code << 16);
    case FLOAT8_E4M3: /* one NaN a sign, no infinity */
        magnitude = (code & 0x7F) << 20;
        bits = choose(is_less(magnitude, (words){0} + (0x7Fu << 20)), widened(magnitude, 120), (words){0} + 0x7FC00000u);
        return (floats)(bits | (code & 0x80) << 24);
    case FLOAT8_E5M2: /* the upper half of a FLOAT16 */
        code <<= 8;
        break;
    default:
        break;
    }
    magnitude = (code & 0x7FFF) << 13;
    bits = choose(is_less(magnitude, (words){0} + 0x0F800000u), widened(magnitude, 112), magnitude | 0x7F800000u);
    return (floats)(bits | (code & 0x8000) << 16);
}

/* LANES codes from element `at` on, which may lie at any address. */
INLINE words code_at(stored model, int kind, size_t at) {
    words code;
    halves half;
    octets octet;
    switch (width(kind)) {
    case 4:
        memcpy(&code, model + 4 * at, sizeof code);
        return code;
    case 2:
        memcpy(&half, model + 2 * at, sizeof half);
        return __builtin_convertvector(half, words);
    default:
        memcpy(&octet, model + at, sizeof octet);
        return __builtin_convertvector(octet, words);
    }
}

INLINE floats load(stored model, int kind, size_t at) { return value_of(code_at(model, kind, at), kind); }

/* A run of octets as words, by a plain loop: compilers widen that in whole registers, but take eight octets by themselves apart. */
INLINE void octets_at(stored model, words *into) {
    uint32_t *flat = (uint32_t *)into;
    for (size_t at = 0; at < RUN; at++) flat[at] = model[at];
}

/* And back. */
INLINE void put_octets(const words *octets, unsigned char *out) {
    const uint32_t *flat = (const uint32_t *)octets;
    for (size_t at = 0; at < RUN; at++) out[at] = (unsigned char)flat[at];
}

INLINE double total_of(doubles lanes) {
    double sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
    return sum;
}

INLINE double total(floats lanes) { return total_of(__builtin_convertvector(lanes, doubles)); }

#endif
