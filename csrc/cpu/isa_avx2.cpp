// The kernels for avx2: nothing but a choice of lanes. The compiler flags are in CMakeLists.txt.
#define FASTMERGE_LANES_AVX2
#define FASTMERGE_KERNELS kernels_avx2
#include "kernels.inl"
