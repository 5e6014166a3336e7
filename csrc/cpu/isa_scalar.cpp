// The kernels for scalar: nothing but a choice of lanes. The compiler flags are in CMakeLists.txt.
#define FASTMERGE_LANES_SCALAR
#define FASTMERGE_KERNELS kernels_scalar
#include "kernels.inl"
