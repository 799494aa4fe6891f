"""What the tests share: the oracle, the small networks, stand-ins for broken installations."""
