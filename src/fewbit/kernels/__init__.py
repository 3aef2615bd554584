"""Running quantized checkpoints: the layers, the kernels behind them, and `load`."""
