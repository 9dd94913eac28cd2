"""Meshes and sharding."""
