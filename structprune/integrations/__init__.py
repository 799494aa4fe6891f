"""Callbacks and handlers that prune while other people's trainers train.

Each file is for one library and imports it; `import structprune` imports none of them.
"""
