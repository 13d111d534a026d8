"""Parts of a training run beside its loop: checks of the settings, data, samples, benchmarks."""
