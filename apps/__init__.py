"""The `sinuous` command: training, evaluation, demos and benchmarks."""
