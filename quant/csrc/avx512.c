// 64 bytes at a time: servers since 2017 or so.
#ifdef __x86_64__
#define TARGET __attribute__((target("avx512f,avx512bw")))
#define KERNELS msfp_avx512
#define SATURATES 1

#include "wide.h"
#endif
