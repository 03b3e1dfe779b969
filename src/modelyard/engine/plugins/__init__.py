"""Our plugins of vLLM, which it calls in each of its processes: cures for its faults, each in the frame of `cures`."""
