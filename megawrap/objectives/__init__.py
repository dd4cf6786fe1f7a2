"""Objectives: what is learned from a batch, one file each."""
