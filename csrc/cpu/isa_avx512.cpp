// The kernels for avx512: nothing but a choice of lanes. The compiler flags are in CMakeLists.txt.
#define FASTMERGE_LANES_AVX512
#define FASTMERGE_KERNELS kernels_avx512
#include "kernels.inl"
