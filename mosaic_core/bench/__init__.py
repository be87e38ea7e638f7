"""Measuring: what a recipe costs per step and in memory, and whether it trains faster."""
