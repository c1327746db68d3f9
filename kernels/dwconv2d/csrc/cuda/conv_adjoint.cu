#include "tiled_launch.cuh"

DEFINE_TILED_LAUNCH(launch_conv_adjoint, with_tiled_conv, tiled_adjoint)
