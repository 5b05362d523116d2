"""Cases that tests and ``gpu_check`` share; nothing here needs pytest or the authors' package."""
