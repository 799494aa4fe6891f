"""One plan of blocks and widths: how many branches go, and how many channels of what is left."""
