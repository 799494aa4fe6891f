"""How many channels of each group go."""
