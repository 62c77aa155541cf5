// Numbers in CUDA kernels that are compiled at run time, with ELEMENT: 0 float32, 1 bfloat16, 2 float16.

typedef long long i64;

#ifndef EMULATED
__device__ __forceinline__ float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float narrowed_bits_to_float(unsigned bits) {
    float y;
#if ELEMENT == 2
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"((unsigned short)bits));
#else
    y = __uint_as_float(bits << 16);
#endif
    return y;
}
__device__ __forceinline__ unsigned narrow(float x) {
    unsigned short y;
#if ELEMENT == 2
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
#endif
    return y;
}
#endif

#if ELEMENT == 0
typedef float element;
__device__ __forceinline__ element to_element(float x) { return x; }
#else
typedef unsigned short element;
__device__ __forceinline__ element to_element(float x) { return (element)narrow(x); }
#endif
