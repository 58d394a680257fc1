// 64 bytes at a time: servers since 2017 or so.
#ifdef __x86_64__
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "msfp.h"

#define TARGET __attribute__((target("avx512f,avx512bw")))
#define KERNELS msfp_avx512
#define SATURATES 1
#define VECTOR __m512i
#define SIZE 64
#define GROUP 6
#define V(operation) V_(operation)
#define V_(operation) _mm512_##operation
#define LOAD loadu_si512
#define STORE storeu_si512
#define REPEAT broadcast_i32x4
#define AND and_si512
#define ZERO setzero_si512

#include "vectors.h"

#include "layer.h"
#endif
