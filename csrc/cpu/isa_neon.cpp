// The kernels for neon: nothing but a choice of lanes. The compiler flags are in CMakeLists.txt.
#define FASTMERGE_LANES_NEON
#define FASTMERGE_KERNELS kernels_neon
#include "kernels.inl"
