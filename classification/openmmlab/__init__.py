"""What detection, segmentation and mmpretrain share: safe reading of checkpoints, checks of a config, the tools."""
