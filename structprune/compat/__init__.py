"""Other libraries' ways of calling, on the engine of this one."""
