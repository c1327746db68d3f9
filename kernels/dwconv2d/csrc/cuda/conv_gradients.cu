#include "tiled_launch.cuh"

DEFINE_TILED_LAUNCH(launch_conv_gradients, with_tiled_conv, tiled_gradients)
