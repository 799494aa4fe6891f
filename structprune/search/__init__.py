"""Search: from what each layer loses at several widths, and from trials, to the best network within limits."""
