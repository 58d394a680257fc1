// What `avx512.c` and `vnni.c` share: 64 bytes at a time.
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "msfp.h"

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
