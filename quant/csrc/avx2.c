// 32 bytes at a time: x86-64 processors since 2013 or so.
#ifdef __x86_64__
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "msfp.h"

#define TARGET __attribute__((target("avx2")))
#define KERNELS msfp_avx2
#define SATURATES 1
#define VECTOR __m256i
#define SIZE 32
#define GROUP 2
#define V(operation) V_(operation)
#define V_(operation) _mm256_##operation
#define LOAD loadu_si256
#define STORE storeu_si256
#define REPEAT broadcastsi128_si256
#define AND and_si256
#define ZERO setzero_si256
#define FETCH

#include "vectors.h"

#include "layer.h"
#endif
