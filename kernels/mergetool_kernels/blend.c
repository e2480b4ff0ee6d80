/* What a merge does to an element, in one pass over the stored bytes: widen, the program's instructions, one rounding, and
 * if asked what became of the first model's element. It stays in the nearest cache between them.
 *
 * Only what is ordinary is done here, elements that are finite and that the output can hold; of anything else the caller is
 * told, and does it elsewhere. */

#include "stored.h"

enum { LOAD, SCALE, ADD, SUBTRACT };
enum { REGISTERS = 8 };

typedef struct {
    int32_t operation, target, argument; /* an argument is an operand, a factor or a register */
} instruction;

typedef struct {
    int64_t moved, eaten, below;
    double energy, kept;
} movement;

/* Of each kind of output: stored bits of the mantissa, smallest exponent, and below what magnitude everything is ordinary:
 * no result becomes larger than the largest number by rounding, and no difference of two overflows. */
static const int MANTISSA[] = {23, 7, 10, 3, 2}, SMALLEST[] = {-126, -126, -14, -6, -14};
static const uint32_t LIMIT[] = {0x7E800000, 0x7E800000, 0x477FE000, 0x43E00000, 0x47600000}; /* 2^126, 65504, 448, 57344 */

/* Float32 rounded to nearest even to a code of a format that can hold it. */
INLINE words code_of(floats value, int kind) {
    words bits = (words)value;
    if (kind == FLOAT32) return bits;
    const int dropped = 23 - MANTISSA[kind];
    if (kind == BFLOAT16) return (bits + 0x7FFF + (bits >> dropped & 1)) >> dropped;
    words sign = bits >> 31, magnitude = bits & 0x7FFFFFFF;
    const uint32_t rebias = (uint32_t)(SMALLEST[kind] + 126) << 23;
    words normal = (magnitude - rebias + ((1u << (dropped - 1)) - 1) + (magnitude >> dropped & 1)) >> dropped;
    /* Of a number whose spacing is the smallest of the format, float32 itself does the rounding. */
    words magic = (words){0} + ((uint32_t)(SMALLEST[kind] + dropped + 127) << 23);
    words subnormal = (words)((floats)magnitude + (floats)magic) - magic;
    words small = is_less(magnitude, (words){0} + ((uint32_t)(SMALLEST[kind] + 127) << 23));
    return choose(small, subnormal, normal) | sign << (width(kind) == 2 ? 15 : 7);
}

/* Stores LANES codes of two or four bytes. */
INLINE void put(unsigned char *out, int kind, size_t at, words code) {
    halves half = __builtin_convertvector(code, halves);
    if (width(kind) == 4)
        memcpy(out + 4 * at, &code, sizeof code);
    else
        memcpy(out + 2 * at, &half, sizeof half);
}

INLINE void widen(stored model, int kind, float scale, floats *into) {
    words octets[RUN / LANES];
    if (width(kind) == 1) octets_at(model, octets);
    for (size_t at = 0; at < RUN; at += LANES)
        into[at / LANES] = value_of(width(kind) == 1 ? octets[at / LANES] : code_at(model, kind, at), kind) * scale;
}

/* One copy of the loop for each format, so that none of them asks which one it is. */
INLINE void widen_any(stored model, int kind, float scale, floats *into) {
    switch (kind) {
    case FLOAT32: widen(model, FLOAT32, scale, into); break;
    case BFLOAT16: widen(model, BFLOAT16, scale, into); break;
    case FLOAT16: widen(model, FLOAT16, scale, into); break;
    case FLOAT8_E4M3: widen(model, FLOAT8_E4M3, scale, into); break;
    default: widen(model, FLOAT8_E5M2, scale, into);
    }
}

/* A run cut to the largest number of a small format; what is not finite stays so. */
INLINE void cut(floats *result, int kind) {
    const words limit = (words){0} + LIMIT[kind], infinite = (words){0} + 0x7F800000;
    for (size_t i = 0; i < RUN / LANES; i++) {
        words bits = (words)result[i], magnitude = bits & 0x7FFFFFFF;
        words beyond = is_less(limit, magnitude) & is_less(magnitude, infinite);
        result[i] = (floats)choose(beyond, limit | (bits & 0x80000000), bits);
    }
}

/* The power of two of a number's binade; of a format's subnormals that of its smallest normal numbers. */
INLINE floats binade(floats value, int kind) {
    const floats smallest = (floats)((words){0} + ((uint32_t)(SMALLEST[kind] + 127) << 23));
    floats power = (floats)((words)value & 0x7F800000);
    return (floats)choose((words)(power < smallest), (words)smallest, (words)power);
}

/* A bijection of words that leaves no visible pattern ("lowbias32", C. Wellons, 2018). */
INLINE words mix(words x) {
    x = (x ^ x >> 16) * 0x7FEB352Du;
    x = (x ^ x >> 15) * 0x846CA68Bu;
    return x ^ x >> 16;
}

/* The random bits of LANES elements from `index` on, as mergetool.ops.rounding defines them. */
INLINE words random_bits(uint64_t key, uint64_t index) {
    const words count = {0, 1, 2, 3, 4, 5, 6, 7};
    words low = (uint32_t)index + count, high = (words){0} + (uint32_t)(index >> 32);
    if ((uint32_t)index > UINT32_MAX - LANES) high += (words)(low < (uint32_t)index) & 1;
    return mix(mix(low + (uint32_t)key) ^ ((uint32_t)(key >> 32) + high * 0x9E3779B9u));
}

/* A run moved to numbers of a small format: away from zero with the probability of what would be cut, else towards it. Raises
 * `top` to the largest magnitude before that: what is not finite may come out as a number. */
INLINE void dither(const floats *result, int kind, uint64_t key, uint64_t index, floats *rounded, words *top) {
    for (size_t i = 0; i < RUN / LANES; i++) {
        words bits = (words)result[i], random = random_bits(key, index + i * LANES), magnitude = bits & 0x7FFFFFFF;
        *top = choose(is_less(*top, magnitude), magnitude, *top);
        if (kind == BFLOAT16) { /* the same choice on the bits: what is cut, plus random ones, carries over or not */
            rounded[i] = (floats)((bits + (0xFFFF - (random >> 16))) & 0xFFFF0000u);
            continue;
        }
        floats size = (floats)magnitude;
        floats spacing = binade(size, kind) * (1.0f / (float)(1 << MANTISSA[kind]));
        floats steps = size * (floats)(0x7F000000u - (words)spacing); /* by 1 / spacing, a power of two */
        floats below = __builtin_convertvector(__builtin_convertvector(steps, integers), floats);
        floats drawn = __builtin_convertvector((integers)(random >> 8), floats) * 0x1p-24f;
        floats up = (floats)((words)(drawn < steps - below) & (words)((floats){0} + 1.0f));
        rounded[i] = (floats)((words)((below + up) * spacing) | (bits & 0x80000000u));
    }
}

INLINE const floats *dither_any(const floats *result, int kind, uint64_t key, uint64_t index, floats *rounded,
                                words *top) {
    switch (kind) {
    case BFLOAT16: dither(result, BFLOAT16, key, index, rounded, top); break;
    case FLOAT16: dither(result, FLOAT16, key, index, rounded, top); break;
    case FLOAT8_E4M3: dither(result, FLOAT8_E4M3, key, index, rounded, top); break;
    case FLOAT8_E5M2: dither(result, FLOAT8_E5M2, key, index, rounded, top); break;
    default: return result; /* nothing of a float32 is cut */
    }
    return rounded;
}

/* Rounds a run into `out`, and raises `top` to the largest magnitude in it; returns whether all of it is ordinary. */
INLINE int round_run(const floats *result, int kind, unsigned char *out, words *top) {
    words largest = *top, octets[RUN / LANES];
    for (size_t at = 0; at < RUN; at += LANES) {
        words magnitude = (words)result[at / LANES] & 0x7FFFFFFF, code = code_of(result[at / LANES], kind);
        largest = choose(is_less(largest, magnitude), magnitude, largest);
        if (width(kind) == 1)
            octets[at / LANES] = code;
        else
            put(out, kind, at, code);
    }
    if (width(kind) == 1) put_octets(octets, out);
    *top = largest;
    words beyond = is_less((words){0} + LIMIT[kind], largest);
    uint32_t any = 0;
    for (int lane = 0; lane < LANES; lane++) any |= beyond[lane];
    return !any;
}

INLINE int round_any(const floats *result, int kind, unsigned char *out, words *top) {
    switch (kind) {
    case FLOAT32: return round_run(result, FLOAT32, out, top);
    case BFLOAT16: return round_run(result, BFLOAT16, out, top);
    case FLOAT16: return round_run(result, FLOAT16, out, top);
    case FLOAT8_E4M3: return round_run(result, FLOAT8_E4M3, out, top);
    default: return round_run(result, FLOAT8_E5M2, out, top);
    }
}

typedef struct {
    words moved, eaten, below;
} counts;

/* Counts one vector's elements: `delta` is what a merge added to them, `change` what of it is stored, `half` half a unit there. */
INLINE void tally(counts *of, floats delta, floats change, floats half) {
    words moved = (words)(delta != 0), size = (words)delta & 0x7FFFFFFF;
    of->moved -= moved;
    of->eaten -= moved & (words)(change == 0);
    of->below -= moved & (words)((floats)size < half);
}

INLINE void add_counts(const counts *of, movement *found) {
    for (int lane = 0; lane < LANES; lane++) {
        found->moved += of->moved[lane];
        found->eaten += of->eaten[lane];
        found->below += of->below[lane];
    }
}

/* Adds what a run did to the first model to `found`, as mergetool.ops.movement defines it; returns whether the first model's
 * elements are ordinary. */
INLINE int measure(const floats *result, const floats *first, stored out, int kind, movement *found) {
    const floats half_unit = (floats)((words){0} + ((uint32_t)(126 - MANTISSA[kind]) << 23));
    floats energies = {0}, kept = {0}, came[RUN / LANES];
    widen(out, kind, 1, came);
    words largest = {0};
    counts of = {0};
    for (size_t at = 0; at < RUN; at += LANES) {
        floats x = first[at / LANES], delta = result[at / LANES] - x;
        floats change = came[at / LANES] - value_of(code_of(x, kind), kind);
        words magnitude = (words)x & 0x7FFFFFFF;
        largest = choose(is_less(largest, magnitude), magnitude, largest);
        tally(&of, delta, change, binade(x, kind) * half_unit);
        energies += delta * delta;
        kept += delta * change;
    }
    words beyond = is_less((words){0} + LIMIT[kind], largest);
    uint32_t any = 0, moved = 0;
    for (int lane = 0; lane < LANES; lane++) {
        any |= beyond[lane];
        moved |= of.moved[lane];
    }
    if (any) return 0;
    add_counts(&of, found);
    double energy = total(energies), through = total(kept);
    if (moved && !(energy > 0x1p-100 && energy < 0x1p120)) { /* squares that float32 may have lost or overflowed */
        energy = through = 0;
        for (size_t at = 0; at < RUN; at += LANES) {
            floats x = first[at / LANES], delta = result[at / LANES] - x;
            floats change = came[at / LANES] - value_of(code_of(x, kind), kind);
            for (int lane = 0; lane < LANES; lane++) {
                energy += (double)delta[lane] * delta[lane];
                through += (double)delta[lane] * change[lane];
            }
        }
    }
    found->energy += energy;
    found->kept += through;
    return 1;
}

INLINE int measure_any(const floats *result, const floats *first, stored out, int kind, movement *found) {
    switch (kind) {
    case FLOAT32: return measure(result, first, out, FLOAT32, found);
    case BFLOAT16: return measure(result, first, out, BFLOAT16, found);
    case FLOAT16: return measure(result, first, out, FLOAT16, found);
    case FLOAT8_E4M3: return measure(result, first, out, FLOAT8_E4M3, found);
    default: return measure(result, first, out, FLOAT8_E5M2, found);
    }
}

/* A run's elements where they lie, or if the model ends before the run does a copy with zeros behind them. */
INLINE stored whole_run(stored model, int kind, size_t at, size_t count, unsigned char *padded) {
    stored here = model + at * width(kind);
    if (count - at >= RUN) return here;
    memset(padded, 0, 4 * RUN);
    memcpy(padded, here, (count - at) * width(kind));
    return padded;
}

/* Runs a program of `instructions` steps, on registers below REGISTERS, over `count` elements of the operands, each times
 * its operand's scale, and rounds register 0 to `out`, cut to its largest number if it is to be `saturating`: to nearest, or if
 * it is to be `stochastic` by the random bits of `key`, the first element being number `index`. `largest` becomes the largest
 * magnitude before rounding. With a `first` operand that is not negative it also adds to `found`. Returns 0 when
 * something is not ordinary; what was written is of no use then. */
EVERY_PROCESSOR EXPORTED
int mergetool_blend(const instruction *program, int instructions, const float *factors, const stored *operands,
                    const int *kinds, const float *scales, size_t count, int first, unsigned char *out, int out_kind,
                    int saturating, int stochastic, uint64_t key, uint64_t index, float *largest, movement *found) {
    words top = {0};
    static const size_t VECTORS = RUN / LANES;
    floats registers[REGISTERS][RUN / LANES], base[RUN / LANES], dithered[RUN / LANES];
    unsigned char padded[4 * RUN], last[4 * RUN];
    for (size_t at = 0; at < count; at += RUN) {
        for (int step = 0; step < instructions; step++) {
            floats *target = registers[program[step].target];
            int argument = program[step].argument;
            switch (program[step].operation) {
            case LOAD:
                widen_any(whole_run(operands[argument], kinds[argument], at, count, padded), kinds[argument],
                          scales[argument], target);
                break;
            case SCALE:
                for (size_t i = 0; i < VECTORS; i++) target[i] *= factors[argument];
                break;
            case ADD:
                for (size_t i = 0; i < VECTORS; i++) target[i] += registers[argument][i];
                break;
            default:
                for (size_t i = 0; i < VECTORS; i++) target[i] -= registers[argument][i];
            }
        }
        if (saturating) cut(registers[0], out_kind);
        size_t bytes = width(out_kind);
        unsigned char *here = count - at < RUN ? last : out + at * bytes;
        const floats *rounded = registers[0];
        if (stochastic) rounded = dither_any(rounded, out_kind, key, index + at, dithered, &top);
        if (!round_any(rounded, out_kind, here, &top)) return 0;
        if (here == last) memcpy(out + at * bytes, last, (count - at) * bytes);
        if (first >= 0) {
            widen_any(whole_run(operands[first], kinds[first], at, count, padded), kinds[first], scales[first], base);
            if (!measure_any(registers[0], base, here, out_kind, found)) return 0;
        }
    }
    *largest = 0;
    for (int lane = 0; lane < LANES; lane++)
        if (((floats)top)[lane] > *largest) *largest = ((floats)top)[lane];
    return 1;
}

/* What storing did to the elements of a quantised weight: `came` are its codes, `alone` those of the `first` model's elements
 * by themselves, both times `scale`. Sums in float64. Returns 0 when one of them is not finite. */
EVERY_PROCESSOR EXPORTED
int mergetool_moves(stored result, stored first, stored came, stored alone, int kind, float scale, size_t count,
                    movement *found) {
    const float step = scale / (float)(1 << MANTISSA[kind]);
    unsigned char padded[4][4 * RUN];
    floats results[RUN / LANES], firsts[RUN / LANES], stands[RUN / LANES], bases[RUN / LANES];
    doubles energies = {0}, kept = {0};
    for (size_t at = 0; at < count; at += RUN) {
        counts of = {0};
        widen_any(whole_run(result, FLOAT32, at, count, padded[0]), FLOAT32, 1, results);
        widen_any(whole_run(first, FLOAT32, at, count, padded[1]), FLOAT32, 1, firsts);
        widen_any(whole_run(came, kind, at, count, padded[2]), kind, 1, stands);
        widen_any(whole_run(alone, kind, at, count, padded[3]), kind, 1, bases);
        for (size_t i = 0; i < RUN / LANES; i++) {
            floats delta = results[i] - firsts[i], change = stands[i] * scale - bases[i] * scale;
            tally(&of, delta, change, binade(bases[i], kind) * step * 0.5f);
            doubles wide = __builtin_convertvector(delta, doubles);
            energies += wide * wide;
            kept += wide * __builtin_convertvector(change, doubles);
        }
        add_counts(&of, found);
    }
    found->energy = total_of(energies);
    found->kept = total_of(kept);
    return found->energy - found->energy == 0 && found->kept - found->kept == 0;
}
