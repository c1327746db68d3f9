#include "tiled_launch.cuh"

DEFINE_TILED_LAUNCH(launch_conv, with_tiled_conv, tiled_forward)
