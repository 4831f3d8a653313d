/* The same steps for processors of level x86-64-v3 (AVX2); see steps.c. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("arch=x86-64-v3")
#define FOR_CPU _v3
#include "steps.c"
#else
typedef int nothing_for_this_processor;
#endif
