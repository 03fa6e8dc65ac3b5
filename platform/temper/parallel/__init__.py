"""Layers and collectives that make a sharded computation equal to the unsharded one."""
