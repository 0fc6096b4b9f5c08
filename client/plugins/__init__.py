"""Plugins of the local loop, one file a technique. `tofu.plugins` has their interface and finds them by name."""
