// 64 bytes at a time, with an instruction that adds four products of bytes to 32 bits: Ice Lake, Zen 4 and later.
#ifdef __x86_64__
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vnni")))
#define KERNELS msfp_vnni
#define SATURATES 0
#define DOT dpbusd_epi32

#include "wide.h"
#endif
