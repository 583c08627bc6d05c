"""One file a format that other systems write; `landscape.checkpoints.find` asks them in turn."""
