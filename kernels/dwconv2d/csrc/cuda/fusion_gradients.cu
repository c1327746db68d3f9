#include "tiled_launch.cuh"

DEFINE_TILED_LAUNCH(launch_fusion_gradients, with_tiled_fusion, tiled_gradients)
