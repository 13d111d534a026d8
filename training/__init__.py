"""Parts of train.py and report.py: checks of the settings, data, scoring, samples, benchmarks, curves."""
