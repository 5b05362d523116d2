"""What commands share: one look of output, progress, Ctrl-C, and processes that end with them."""
