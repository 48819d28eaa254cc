"""One file per policy: its sizes, image tiling, chat template and weight map."""
