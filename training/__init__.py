"""Parts of train.py outside its loop: checks of the settings, data, samples, benchmarks."""
