"""Flower's published example apps, as they are, with compressed and with secure updates."""
