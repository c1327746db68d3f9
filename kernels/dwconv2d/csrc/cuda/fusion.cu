#include "tiled_launch.cuh"

DEFINE_TILED_LAUNCH(launch_fusion, with_tiled_fusion, tiled_forward)
