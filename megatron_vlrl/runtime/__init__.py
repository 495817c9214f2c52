"""The machine: device, processes, seeds; the only place that says "cuda"."""
