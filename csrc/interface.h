#pragma once

// Changes whenever an op's schema or meaning does; kernels/_native.py refuses any other number, so
// that an extension left over from an older checkout is never used.
#define HEATSINK_INTERFACE 5

// A function marked so is compiled for the baseline, AVX2 and AVX-512 and chosen when the library
// is loaded. Bits cannot differ: the code is integer or plain IEEE, and contraction is off.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define HEATSINK_CLONES __attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))
#else
#define HEATSINK_CLONES
#endif

#define HEATSINK_INLINE inline __attribute__((always_inline))

// Before a loop whose rounds touch nothing in common, though pointers may be the same.
#if defined(__GNUC__) && !defined(__clang__)
#define HEATSINK_INDEPENDENT _Pragma("GCC ivdep")
#else
#define HEATSINK_INDEPENDENT
#endif
