"""What is done to every channel alone: affine maps, activations, gates, sums and statistics over the patches."""
